"""Finds the shape of an image encoder's states by running it once on the meta device, where nothing is computed."""

from __future__ import annotations

import abc
from dataclasses import dataclass
from math import isqrt
from typing import Any, NamedTuple

from torch import Tensor, nn

from fastvlp.errors import UserError
from fastvlp.model.encoders.interface import ImageEncoderConfig


class Measured(NamedTuple):
    """The states of an encoder: `prefix` ones before a map of `grid` x `grid`, `width` numbers each. `unused`: names of the
    parameters that the states do not depend on."""

    width: int
    prefix: int
    grid: int
    unused: frozenset[str]


@dataclass(frozen=True, kw_only=True)
class MeasuredConfig(ImageEncoderConfig):
    """An image encoder whose states are known by running it."""

    @property
    @abc.abstractmethod
    def measured(self) -> Measured:
        """The shape of the encoder's states. Raises UserError if the output is not states of an image."""

    @property
    def width(self) -> int:
        return self.measured.width

    @property
    def grid(self) -> int:
        return self.measured.grid

    @property
    def prefix(self) -> int:
        return self.measured.prefix

    def check(self) -> None:
        # First: without states there is no width and no grid.
        _ = self.measured
        super().check()


def as_states(output: Tensor) -> Tensor:
    """Tokens [B N D] as they are; a map [B C H W] as its cells, row by row."""
    return output.flatten(2).transpose(1, 2) if output.ndim == 4 else output


def measure(module: nn.Module, image: Tensor, output: Any, patch: int | None, name: str) -> Measured:
    """Reads off `output`, what `module` made of `image` [B 3 S S].

    Args:
        patch: side of a patch in pixels, where it is known; it tells the map from the states before it.
        name: of the encoder, for messages.

    Raises UserError if it is neither tokens nor a square map.
    """
    size = image.shape[-1]
    if not isinstance(output, Tensor) or output.ndim not in (3, 4):
        what = f"a tensor of shape {list(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
        raise UserError(f"{name}: gives {what}; an image encoder gives tokens [B N D] or a map [B C H W]")
    if output.ndim == 4:
        _, width, height, grid = output.shape
        if height != grid:
            raise UserError(
                f"{name}: makes a map of {height} x {grid} cells for a square image, which must be square too"
            )
        prefix = 0
    else:
        _, tokens, width = output.shape
        grid = size // patch if patch else 0
        grid = grid if 0 < grid**2 <= tokens else isqrt(tokens)
        prefix = tokens - grid**2
    states = as_states(output)
    states.float().sum().backward()
    unused = frozenset(key for key, parameter in module.named_parameters() if parameter.grad is None)
    return Measured(width, prefix, grid, unused)


def leave_unused(module: nn.Module, measured: Measured) -> None:
    """Trains no parameter that the states do not depend on, such as a head or a mask token: DDP would wait for its gradient."""
    for name, parameter in module.named_parameters():
        if name in measured.unused:
            parameter.requires_grad_(False)


def keep_statistics(module: nn.Module) -> None:
    """Batch norms compute with the statistics that they have, also in training."""
    for part in module.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            part.eval()
