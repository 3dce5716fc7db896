"""The whole state of a run in one file, written whole or not at all."""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any

import torch

from fastvlp.errors import UserError
from fastvlp.files import whole_file


def save_checkpoint(path: str | Path, state: dict[str, Any]) -> None:
    """Tensors, numbers, strings and their containers only: the file is read back without running anything in it.

    Raises UserError where the disk is full or the folder not writable; an older file then stays as it was.
    """
    path = Path(path)
    # One name for ever, so that what a killed run leaves behind is overwritten by the next.
    with whole_file(path, f"{path.name}.tmp") as part, part.open("wb") as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:
            # The zip writer turns a failed write of the last bytes into a RuntimeError.
            raise OSError(None, str(error).splitlines()[0]) from error


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """On the CPU, whatever device it was saved from. Raises UserError where the file is missing or damaged."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no checkpoint here; give the folder of a run that has saved one")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        # Torch goes on with advice, such as to load the file without its safeguard.
        cause = re.split(r"\.\s|\n", str(error))[0] or type(error).__name__
        raise UserError(
            f"{path}: not a readable checkpoint ({cause}); restore the file or start the run anew"
        ) from error
    if not isinstance(state, dict):
        raise UserError(f"{path}: not a checkpoint of a run, it holds a {type(state).__name__}")
    return state
