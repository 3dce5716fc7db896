"""Help without torch.

`vlp COMMAND --help` prints the fields of dataclasses and the arguments of functions. The modules that hold them also define
layers and losses, so they import torch, which takes most of the time until the help appears. While help is printed, and
nothing else, a stand-in answers to that import, as Sphinx's `autodoc_mock_imports` does.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, MutableSequence, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def asks_for_help_alone(argv: Sequence[str]) -> bool:
    """Whether the words are a command of the package and `--help`: other options, and files of one's own, may compute."""
    *words, last = argv or [""]
    return last in ("-h", "--help") and not any(word.startswith("-") or word.endswith(".py") for word in words)


def stand_in_for_torch() -> None:
    """Answers every later import of torch in this process, unless it is there already. There is no way back."""
    if "torch" not in sys.modules:
        sys.meta_path.insert(0, _Finder())


class _StandIn(ModuleType):
    """A module, class, decorator or constant of torch: what its name is used for while modules are loaded."""

    __path__: MutableSequence[str] = []  # noqa: RUF012

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _StandIn(f"{self.__name__}.{name}")

    def __call__(self, *args: Any, **options: Any) -> Any:
        """Returns the decorated object, since torch's name may be used as a decorator."""
        return args[0] if len(args) == 1 and callable(args[0]) else self

    def __mro_entries__(self, bases: Any) -> tuple[type, ...]:
        """Returns no base classes, since torch's name may be used as a base class."""
        return ()

    def __or__(self, other: Any) -> Any:
        return self

    __ror__ = __or__

    def __getitem__(self, key: Any) -> Any:
        return self

    def __iter__(self) -> Iterator[Any]:
        """Else Python would iterate by `__getitem__`, without end."""
        return iter(())


class _Finder(MetaPathFinder, Loader):
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name.partition(".")[0] == "torch" else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _StandIn(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """There is nothing to run."""
