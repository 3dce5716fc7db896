"""A file that takes long to make: one process writes it beside its place, under a lock, and the others wait and then use it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows has no file locks of this kind, so two processes may write the same file there
    fcntl = None  # type: ignore[assignment]


@contextmanager
def open_part(path: Path, wait: Callable[[], None], is_made: Callable[[], bool] | None = None) -> Iterator[int | None]:
    """Opens the unfinished file beside `path` for writing, and locks it against other processes. Yields None if another process
    has completed `path` meanwhile. Calls `wait` before it waits for the lock. The caller renames the file with `complete`.

    Args:
        is_made: whether `path` is what is wanted; by default, whether it is there.
    """
    part = part_of(path)
    part.parent.mkdir(parents=True, exist_ok=True)
    while True:
        file = os.open(part, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            _lock(file, wait)
            if (is_made or path.exists)():
                if _is_same(file, part):
                    part.unlink()
                yield None
                return
            # The process that held the lock may have renamed or removed this file before it released the lock: open again.
            if _is_same(file, part):
                yield file
                return
        finally:
            os.close(file)


def complete(file: int, path: Path) -> None:
    """Renames an unfinished file, which is now full, to its final name."""
    os.fsync(file)
    part_of(path).replace(path)


def part_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.part")


def _lock(file: int, wait: Callable[[], None]) -> None:
    if fcntl is None:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        wait()
        fcntl.flock(file, fcntl.LOCK_EX)


def _is_same(file: int, path: Path) -> bool:
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(file), path.stat())
    return False
