"""Count the bytes of tensors that are alive at once, on a CPU, where no allocator reports them.

Under `FakeTensorMode` nothing is computed or stored, so that a step of any size can be counted on any machine.
"""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary


class CountedBytes(TorchDispatchMode):
    """Counts the storages that are made inside the block, from the operation that makes one until nothing refers to it.

    `now` and `peak` are bytes, like CUDA's memory_allocated and its maximum. Memory that a kernel uses internally is not
    seen."""

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
