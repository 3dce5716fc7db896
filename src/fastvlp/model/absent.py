"""A placeholder for a part that a model does not have."""

from __future__ import annotations

from typing import Any

from torch import nn

from fastvlp.errors import UserError


class Absent(nn.Module):
    """Raises a UserError that names the field of the config when it is used. It has no parameters.

    A part that is absent is typed as if it were there, so that code that needs it does not check for it.
    """

    def __init__(self, part: str):
        super().__init__()
        self.part = part

    def __getattr__(self, name: str) -> Any:
        # torch and copy look up names with an underscore to see whether they exist.
        if name.startswith("_"):
            return super().__getattr__(name)
        raise UserError(
            f"the model has no {self.part}, which this objective, task or command needs; use a run that has it, or set "
            f"`model.{self.part}` in a recipe"
        )
