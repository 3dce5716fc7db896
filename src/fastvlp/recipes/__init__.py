"""Recipes: one file a run, with a function of the file's name that returns its TrainConfig."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import pkgutil
import sys
from pathlib import Path
from types import ModuleType

from fastvlp.errors import UserError
from fastvlp.train.run import TrainConfig


def names() -> list[str]:
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def recipe(name: str) -> TrainConfig:
    """By name, or by the path of a file of your own (`my.py`). Raises UserError with the nearest names."""
    if name.endswith(".py"):
        module = _from_file(Path(name))
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


def _from_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise UserError(f"{path}: no such recipe file; recipes that come with fastvlp: {', '.join(names())}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # As when Python runs a file: what lies beside it can be imported.
    folder = str(path.resolve().parent)
    sys.path.insert(0, folder)
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(folder)
    return module
