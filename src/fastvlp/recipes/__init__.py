"""Recipes: one file for each run, with a function of the file's name that returns a TrainConfig."""

from __future__ import annotations

import difflib
import importlib
import inspect
import pkgutil
from pathlib import Path
from types import ModuleType

from fastvlp.errors import UserError
from fastvlp.extensions import import_file
from fastvlp.training.train_config import TrainConfig


def names() -> list[str]:
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def recipe(name: str) -> TrainConfig:
    """Returns the config of a recipe, by its name or by the path of your own file (`my.py`). Raises UserError, with the nearest
    names, if there is no such recipe."""
    module, name = _module(name), Path(name).stem
    make = getattr(module, name, None)
    if not callable(make):
        raise UserError(
            f"{module.__file__}: a recipe must be a function with the name of the file, {name}() -> TrainConfig"
        )
    run = make()
    if not isinstance(run, TrainConfig):
        raise UserError(f"{module.__file__}: {name}() returned a {type(run).__name__}, not a TrainConfig")
    return run


def about_recipe(name: str) -> str:
    """Returns the description of a recipe from its file: the method, its command and its result. Raises UserError as
    `recipe` does."""
    return inspect.getdoc(_module(name)) or ""


def _module(name: str) -> ModuleType:
    if name.endswith(".py"):
        return import_file(name)
    if name in names():
        return importlib.import_module(f"{__name__}.{name}")
    near = difflib.get_close_matches(name, names(), n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(names())}."
    raise UserError(f"{name}: no such recipe; {hint} Give your own file by its path, ending in .py")
