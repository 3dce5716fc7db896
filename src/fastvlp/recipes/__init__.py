"""Recipes: one file for each run, with a function of the file's name that returns a TrainConfig."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from pathlib import Path

from fastvlp.errors import UserError
from fastvlp.extensions import import_file
from fastvlp.training.train_config import TrainConfig


def names() -> list[str]:
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def recipe(name: str) -> TrainConfig:
    """By name, or by the path of a file of your own (`my.py`). Raises UserError with the nearest names."""
    if name.endswith(".py"):
        module = import_file(name)
        name = Path(name).stem
    elif name in names():
        module = importlib.import_module(f"{__name__}.{name}")
    else:
        near = difflib.get_close_matches(name, names(), n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(names())}."
        raise UserError(f"{name}: no such recipe; {hint} A file of your own is given by its path, ending in .py")
    make = getattr(module, name, None)
    if not callable(make):
        raise UserError(f"{module.__file__}: a recipe is a function of the file's name, {name}() -> TrainConfig")
    run = make()
    if not isinstance(run, TrainConfig):
        raise UserError(f"{module.__file__}: {name}() returned a {type(run).__name__}, not a TrainConfig")
    return run
