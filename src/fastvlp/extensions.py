"""Variants of an interface (encoders, objectives, tasks, sources, engines, export targets), also from a user's own file."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from fastvlp.errors import UserError

T = TypeVar("T")
# Folders of the user's files that were imported.
_folders: set[Path] = set()


def import_file(path: str | Path) -> ModuleType:
    """Imports a Python file as a module with the name of the file, once. The file can import modules that are beside it.

    Raises UserError if there is no such file, if it is not valid Python, or if another module of that name was imported before.
    """
    path = Path(path)
    if path.suffix != ".py" or not path.is_file():
        raise UserError(f"{path}: no such Python file")
    folder = str(path.resolve().parent)
    # It stays on the path: a module beside it may be imported later, inside a function.
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        module = importlib.import_module(path.stem)
    except SyntaxError as error:
        raise UserError(f"{error.filename}:{error.lineno}: not valid Python ({error.msg})") from error
    loaded = Path(module.__file__ or "").resolve()
    if loaded != path.resolve():
        raise UserError(f"{path}: another module is called {path.stem} ({loaded}); rename the file")
    _folders.add(loaded.parent)
    return module


def user_function(name: str) -> Callable[..., Any]:
    """The function that a saved file calls `FILE:FUNCTION`, in a file of the user's that was imported before, or in one beside
    it that it imports.

    Raises UserError if there is none.
    """
    file, _, function = name.partition(":")
    module = sys.modules.get(file)
    own = Path(getattr(module, "__file__", None) or "/").resolve().parent in _folders
    value = getattr(module, function, None) if own else None
    if not inspect.isfunction(value) or value.__module__ != file:
        raise UserError(
            f"{name}: no file {file}.py with a function {function} was imported. Import your file first: "
            "`vlp --import FILE.py ...`, or `fastvlp.import_file` in Python"
        )
    return value


def variants(base: type[T], package: str | None = None) -> list[type[T]]:
    """Returns all known concrete subclasses of `base`: those in the modules of `package` (imported here), and those in files
    that the user imported (`import_file`). In the order of their definition."""
    if package is not None:
        for module in pkgutil.iter_modules(importlib.import_module(package).__path__, f"{package}."):
            importlib.import_module(module.name)
    return list(dict.fromkeys(cls for cls in _subclasses(base) if not inspect.isabstract(cls)))


def variant(base: type[T], name: str, package: str | None = None) -> type[T]:
    """The one of `variants` whose class is called `name`, as a saved file calls it; the last one defined where several are.

    Raises UserError if none is known.
    """
    named = [cls for cls in variants(base, package) if cls.__name__ == name]
    if not named:
        raise UserError(
            f"{name}: no class of this name is known as {_article(base.__name__)}. If a file of yours defines it, import that "
            "file first: `vlp --import FILE.py ...`, or `fastvlp.import_file` in Python"
        )
    return named[-1]


def _article(name: str) -> str:
    return f"{'an' if name[0] in 'AEIOU' else 'a'} {name}"


def _subclasses(base: type[T]) -> Iterator[type[T]]:
    for cls in base.__subclasses__():
        yield cls
        yield from _subclasses(cls)
