"""Decoded images kept in memory, for data that is seen many times and fits."""

from __future__ import annotations

import mmap

import torch
from torch import Tensor

from fastvlp.data.records.decode import Stored


class ImageCache:
    """One uint8 [3 size size] for each of `count` records, filled as they are decoded, and how it was stored, which places
    the record's boxes.

    The memory is an anonymous shared mapping: forked workers fill one cache between them, and /dev/shm, small in
    containers, is not involved. A page takes memory when it is first written. A pickled copy starts empty.
    """

    def __init__(self, count: int, size: int):
        self._shape = (count, size)
        self._images = _shared(count * 3 * size * size).view(count, 3, size, size)
        self._stored = _shared(count * 3 * 4).view(torch.int32).view(count, 3)
        self._filled = _shared(count)

    def get(self, i: int) -> Tensor | None:
        return self._images[i] if self._filled[i] else None

    def stored(self, i: int) -> Stored:
        return Stored(*self._stored[i].tolist())

    def put(self, i: int, image: Tensor, stored: Stored | None = None) -> None:
        # Two workers may both decode an image: they write the same bytes. The flag comes last.
        self._images[i] = image
        if stored is not None:
            self._stored[i] = torch.tensor(stored)
        self._filled[i] = 1

    def __reduce__(self) -> tuple[type[ImageCache], tuple[int, int]]:
        return ImageCache, self._shape


def _shared(n: int) -> Tensor:
    return torch.frombuffer(mmap.mmap(-1, n), dtype=torch.uint8)
