"""Decoded images in memory, as many as there is room for."""

from __future__ import annotations

import mmap
import os
from pathlib import Path
from weakref import WeakSet

import torch
from torch import Tensor

from fastvlp.data.records.decode import StoredShape
from fastvlp.data.state_store import say

# Share of the free memory that decoded images may take. The rest is for the model, and for what other programs take later.
ROOM = 0.5
# Bytes of a cached image besides its pixels: its shape, and whether it is there.
_BESIDE = 13
# Where a container says how much memory it may use, and how much of that it uses (cgroups, versions 2 and 1).
_LIMITS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory.stat"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        "/sys/fs/cgroup/memory/memory.stat",
    ),
)

# The caches of this process. Their pages take memory when they are written: until then the system counts them as free.
_CACHES: WeakSet[ImageCache] = WeakSet()


class ImageCache:
    """One decoded image, uint8 [3 size size], for each of `count` places, filled as they are decoded, and the shape in which
    it was stored. Places behind these have no room, and stay empty.

    The memory is an anonymous shared mapping: forked workers fill one cache between them, and /dev/shm, small in
    containers, is not involved. A page takes memory when it is first written. A pickled copy starts empty.

    Raises OSError if the system refuses so much memory.
    """

    def __init__(self, count: int, size: int):
        self._arguments = (count, size)
        self._images = _shared(count * 3 * size * size).view(count, 3, size, size)
        self._shapes = _shared(count * 3 * 4).view(torch.int32).view(count, 3)
        # Looked at for every row: numpy reads one number in a fiftieth of the time.
        self._filled = _shared(count).numpy()
        _CACHES.add(self)

    def __len__(self) -> int:
        return self._arguments[0]

    def __contains__(self, place: int) -> bool:
        return place < self._arguments[0] and bool(self._filled[place])

    @property
    def unfilled(self) -> int:
        """Bytes that it will take when the places that are still empty are filled."""
        count, size = self._arguments
        return (count - int(self._filled.sum(dtype="int64"))) * _bytes_of_one(size)

    def image(self, place: int) -> Tensor:
        return self._images[place]

    def shape(self, place: int) -> StoredShape:
        return StoredShape(*self._shapes[place].tolist())

    def put(self, place: int, image: Tensor, shape: StoredShape) -> None:
        if place >= len(self):
            return
        # Two workers may both decode an image: they write the same bytes. The flag comes last.
        self._images[place] = image
        self._shapes[place] = torch.tensor(shape)
        self._filled[place] = 1

    def __reduce__(self) -> tuple[type[ImageCache], tuple[int, int]]:
        return ImageCache, self._arguments


def room_for_images(source: str, count: int, size: int) -> ImageCache | None:
    """A cache for `count` images, or for the first of them where the free memory has no room for all, which a line says. None
    where there is room for none. What other caches of this process will still take is not free.

    Args:
        source: where the images are from, for the line.
    """
    each, free = _bytes_of_one(size), free_memory()
    room = count
    if free is not None:
        # All processes of a machine have caches of their own.
        own = free // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) - sum(cache.unfilled for cache in _CACHES)
        room = int(ROOM * max(0, own)) // each
    kept = min(count, room)
    cache = None
    try:
        cache = ImageCache(kept, size) if kept else None
    except (OSError, ValueError):  # a system that promises no more than it has
        kept = 0
    if kept < count and int(os.environ.get("LOCAL_RANK", 0)) == 0:
        has = "" if free is None else f", half of the free memory has room for {kept:,}"
        say(
            f"{source}: {count:,} decoded images take {count * each / 1e9:.3g} GB{has}; the others are decoded each time "
            f"(`data.cache` false keeps none)"
        )
    return cache


def free_memory() -> int | None:
    """Bytes that this process could take, within the limit of its container; None if the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError, IndexError):
        return None
    limits = (_free_of_container(*(Path(path) for path in paths)) for paths in _LIMITS)
    return min([free, *(limit for limit in limits if limit is not None)])


def _bytes_of_one(size: int) -> int:
    return 3 * size * size + _BESIDE


def _free_of_container(most: Path, used: Path, stat: Path) -> int | None:
    """None if there is no limit. Pages of files count as used there, and are given up where memory is needed."""
    try:
        files = dict(line.split() for line in stat.read_text().splitlines())
        given_up = int(files.get("inactive_file", files.get("total_inactive_file", 0)))
        return max(0, int(most.read_text()) - int(used.read_text()) + given_up)
    except (OSError, ValueError):  # also the word "max"
        return None


def _shared(n: int) -> Tensor:
    return torch.frombuffer(mmap.mmap(-1, n), dtype=torch.uint8)
