"""Bytes of tensors alive at once, where no allocator tells: on a CPU, or of tensors that are only described.

Under `FakeTensorMode` nothing is computed or stored, so that a step of any size can be counted on any machine.
"""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary


class Held(TorchDispatchMode):
    """`now` and `most`: bytes of the storages made inside, each from the operation that makes it until nothing holds it, as
    CUDA's memory_allocated and its maximum. What a kernel needs within is not seen."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.known = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # An operation may return what it was given, or write into it: that was there before.
        for x in tree_leaves((args, kwargs)):
            if isinstance(x, Tensor):
                self.known.setdefault(x.untyped_storage(), True)
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and x.untyped_storage() not in self.known:
                self._add(x.untyped_storage())
        return out

    def _add(self, storage: Any) -> None:
        self.known[storage] = True
        self.now += storage.nbytes()
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._drop, storage.nbytes())

    def _drop(self, size: int) -> None:
        self.now -= size
