"""Bytes that a training step holds, and the largest batch that fits."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary


class CountedBytes(TorchDispatchMode):
    """Counts the storages that are made inside the block, from the operation that makes one until nothing refers to it, on a
    CPU, where no allocator reports them.

    `now` and `peak` are bytes, like CUDA's memory_allocated and its maximum. Memory that a kernel uses internally is not
    seen. Under `FakeTensorMode` nothing is computed or stored, so that a step of any size can be counted on any machine."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.seen = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # An operation may return one of its inputs, or write into it: that storage is not new.
        for x in tree_leaves((args, kwargs)):
            if isinstance(x, Tensor):
                self.seen.setdefault(x.untyped_storage(), True)
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and x.untyped_storage() not in self.seen:
                self._add(x.untyped_storage())
        return out

    def _add(self, storage: Any) -> None:
        self.seen[storage] = True
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, storage.nbytes())

    def _drop(self, size: int) -> None:
        self.now -= size


def held_bytes(optimiser: torch.optim.Optimizer, *modules: nn.Module) -> int:
    """Bytes of the modules' weights and buffers and of the optimiser's state: what is held between steps."""
    states = [x for state in optimiser.state.values() for x in state.values() if isinstance(x, Tensor)]
    weights = [x for module in modules for x in (*module.parameters(), *module.buffers())]
    storages = {id(x): x.nbytes for x in (*weights, *states)}
    return sum(storages.values())


def batch_bytes(batch: Any) -> int:
    """Bytes of the tensors of a batch, in whatever they are."""
    return sum(x.nbytes for x in tree_leaves(batch) if isinstance(x, Tensor))


@contextmanager
def peak_of_step(device: torch.device) -> Iterator[Callable[[], int]]:
    """Yields a function that returns the most bytes held at once since the block began, beyond those held before: the
    allocator's on a GPU, counted ones on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        yield lambda: torch.cuda.max_memory_allocated(device) - before
        return
    # A compiled block hides what it holds.
    with torch.compiler.set_stance("force_eager"), CountedBytes() as counted:
        yield lambda: counted.peak


def room(device: torch.device) -> float:
    """Bytes of the device's memory; on a CPU infinite, because it is shared with everything else."""
    return float(torch.cuda.get_device_properties(device).total_memory) if device.type == "cuda" else math.inf


def release(device: torch.device) -> None:
    """Gives memory back that nothing refers to."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def largest_rows(bytes_of: Callable[[int], float], limit: float, unit: int) -> int:
    """The largest number of rows, a multiple of `unit`, with bytes_of(rows) <= limit, to within 1/32; 0 where even `unit` rows
    take more. `bytes_of` is infinite where memory ran out.

    Memory grows about linearly, so that each guess lies on the line through the last two points, at most at eight times the
    rows of the last one; after memory ran out, it halves what is left."""
    low, high, guess = 0, math.inf, unit
    points = [(0.0, 0.0)]
    while True:
        points = [points[-1], (guess, bytes_of(guess))]
        (b, before), (a, after) = points
        low, high = (guess, high) if after <= limit and after < math.inf else (low, guess)
        near = max(unit, low // 32 // unit * unit)
        if high - low <= near:
            return low
        linear = before < after < math.inf and limit < math.inf
        on_line = a + (limit - after) * (a - b) / (after - before) if linear else (low + high) / 2
        guess = int(min(max(on_line, low + near), high - unit, 8 * guess)) // unit * unit
