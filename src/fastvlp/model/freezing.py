"""Modules that learn nothing: parts of a model that are frozen, and whole models while they are evaluated."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn


class Freezable(nn.Module):
    """A module some of whose parts learn nothing: no gradient, no dropout, and batch norms keep their statistics."""

    def __init__(self) -> None:
        super().__init__()
        self._frozen: set[str] = set()

    def freeze(self, parts: Iterable[str]) -> None:
        """`parts`: names of parameters and modules."""
        self._frozen |= {*parts}
        for name, parameter in self.named_parameters():
            if any(f"{name}.".startswith(f"{part}.") for part in self._frozen):
                parameter.requires_grad_(False)
        self.train(self.training)

    def keep_mode(self, modules: Iterable[str]) -> None:
        """Keeps modules in evaluation mode, such as batch norms beside adapters. Their parameters are not touched."""
        self._frozen |= {*modules}
        self.train(self.training)

    def train(self, mode: bool = True) -> Freezable:
        super().train(mode)
        for name, module in self.named_modules():
            if name in self._frozen:
                module.eval()
        return self

    def is_frozen(self, part: str) -> bool:
        """Whether the module `part` has parameters and learns none of them."""
        parameters = [*self.get_submodule(part).parameters()]
        return bool(parameters) and not any(parameter.requires_grad for parameter in parameters)


@contextmanager
def evaluation_mode(*modules: nn.Module) -> Iterator[None]:
    """Context without dropout. Afterwards each part is in its former mode again."""
    modes = [(part, part.training) for module in modules for part in module.modules()]
    for module in modules:
        module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


@contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """Context without dropout and without gradients. Afterwards each part is in its former mode again."""
    with evaluation_mode(*modules), torch.no_grad():
        yield
