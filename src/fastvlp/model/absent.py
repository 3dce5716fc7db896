"""What stands where a model has no such part."""

from __future__ import annotations

from typing import Any

from torch import nn

from fastvlp.errors import UserError


class Absent(nn.Module):
    """No parameters. Whoever reads it is told which field of the config would give the part."""

    def __init__(self, part: str):
        super().__init__()
        self.part = part

    def __getattr__(self, name: str) -> Any:
        # Names with an underscore are asked for by torch and copy, which look whether they are there.
        if name.startswith("_"):
            return super().__getattr__(name)
        raise UserError(
            f"the model has no {self.part}, which the objective or task at hand reads: use a run that has learned it, or in "
            f"a recipe set model.{self.part}"
        )
