"""Counts the floating-point operations of the matrix products of a training step, while it runs.

PyTorch's formulas (torch.utils.flop_counter) give the cost of each product that is called, forward and backward: a
multiplication and an addition are two operations, attention counts all pairs of positions although a causal kernel skips
half. Operations that are repeated to save memory are not counted, so that the share of the peak is defined as in PaLM (arXiv
2204.02311, appendix B).

Counting slows a step down by up to a fifth. So each part of a step is counted the first time that it has its shape, and in at
most one step of EVERY.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from fastvlp.batch import Batch
from fastvlp.model.recompute import is_recomputing

aten = torch.ops.aten
EVERY = 50


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    """Counts the scores and the sums of values of attention over [B H L D]."""
    B, H, L, D = query.shape
    return 2 * B * H * L * key.shape[2] * (D + value.shape[3])


def _attention_backward(grad: Tensor, *inputs: Any, **options: Any) -> int:
    """Counts twice the forward pass. PyTorch's formula also counts the scores, which the kernel computes again."""
    return 2 * _attention(*inputs)


# PyTorch has no formulas for the kernels of the CPU.
KERNELS = ("flash_attention", "efficient_attention", "cudnn_attention", "flash_attention_for_cpu")
FORMULAS: Mapping[Any, Callable[..., int]] = {
    **flop_registry,
    **{getattr(aten, f"_scaled_dot_product_{kernel}"): _attention for kernel in KERNELS},
    **{getattr(aten, f"_scaled_dot_product_{kernel}_backward"): _attention_backward for kernel in KERNELS},
}


class Flops(TorchDispatchMode):
    """A context that counts the operations inside its block. `FlopCounterMode` counts the same, but takes three times as
    long."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        formula = FORMULAS.get(getattr(func, "overloadpacket", func))
        if formula is not None and not is_recomputing():
            self.total += formula(*args, **kwargs, out_val=result)
        return result


def gradient_flops(module: nn.Module, loss: Callable[[], Tensor]) -> int:
    """Returns the FLOPs of a loss of `module` and of its gradients, by computing both. The gradients are discarded."""
    with Flops() as flops:
        loss().backward()
    module.zero_grad()
    return flops.total


class Shape(NamedTuple):
    """The properties on which the cost of a part of a step depends: its name, and the batch's rows, tokens of texts and
    regions a row."""

    part: str
    rows: int
    tokens: int = 0
    regions: int = 0

    @classmethod
    def of(cls, part: str, batch: Batch) -> Shape:
        regions = 0 if batch.regions is None else batch.regions.box.shape[1]
        # Images may be smaller at the beginning of a run, and their cost is not estimated from that of others.
        part = f"{part}/{batch.image.shape[-1]}"
        return cls(part, len(batch), batch.ids.shape[1], regions)


class FlopCounter:
    """Adds up the FLOPs of each step from those of its parts.

    Attributes:
        step: FLOPs of the step so far.
        image: number of tokens of an image, for the estimate of a shape that was not counted.
        every: at most one of this number of steps counts a new shape; 0: every step with a new shape does.
    """

    def __init__(self, image: int = 0, *, every: int = EVERY) -> None:
        self.step, self.image, self.every = 0.0, image, every
        self._known: dict[Shape, float] = {}
        self._steps = self._counted = 0
        self._counting = self._new = False

    def begin_step(self) -> None:
        self.step, self._steps, self._new = 0.0, self._steps + 1, False
        self._counting = self._steps > self.every * self._counted

    @contextmanager
    def counting(self, shape: Shape) -> Iterator[None]:
        """Context around a part of the step."""
        alike = [known for known in self._known if known.part == shape.part]
        if shape in alike or (alike and not self._counting):
            yield
            self.step += self._known.get(shape) or self._scaled(shape, alike)
            return
        # A compiled block hides what it computes.
        with torch.compiler.set_stance("force_eager"), Flops() as flops:
            yield
        self._known[shape] = float(flops.total)
        self.step += flops.total
        if not self._new:
            self._new, self._counted = True, self._counted + 1

    def _scaled(self, shape: Shape, alike: Sequence[Shape]) -> float:
        """Estimates the count from the known shape that is nearest in size."""
        size = self._size(shape)
        nearest = min(alike, key=lambda known: abs(self._size(known) - size))
        return self._known[nearest] * size / self._size(nearest)

    def _size(self, shape: Shape) -> int:
        return max(1, shape.rows * (self.image + shape.tokens + shape.regions))
