"""Weights between those that a run started from and those that it ended with (WiSE-FT, arXiv 2109.01903)."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from torch import Tensor

from fastvlp.errors import UserError
from fastvlp.model.saving import load_model, save_model


def interpolate(run: Path, start: str, alpha: float) -> None:
    """Moves the best weights of a run to `alpha` of the way from those it started from. The tuned
    ones are kept beside them as tuned.safetensors. A run whose weights were moved already stays as it is.

    Raises UserError if they were moved by another share.
    """
    tuned, old = load_model(run), load_model(start)
    if (moved := tuned.info.get("alpha")) is not None:
        if moved != alpha:
            raise UserError(f"{run}: its weights were already averaged with `alpha` {moved}; choose another `out`")
        return
    shutil.copyfile(tuned.weights, run / "tuned.safetensors")
    state, before = tuned.model.state_dict(), old.model.state_dict()
    tuned.model.load_state_dict({name: _between(before.get(name), x, alpha) for name, x in state.items()})
    objectives = {name: _between(old.objectives.get(name), x, alpha) for name, x in tuned.objectives.items()}
    info = {name: value for name, value in tuned.info.items() if name != "validation"} | {"alpha": alpha}
    save_model(run, tuned.model, tuned.tokenizer, info, objectives=objectives, name="best")


def _between(old: Tensor | None, new: Tensor, alpha: float) -> Tensor:
    if old is None or old.shape != new.shape or not new.is_floating_point():
        return new
    return torch.lerp(old, new, alpha)
