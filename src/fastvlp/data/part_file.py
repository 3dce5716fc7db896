"""A file that takes long to make: one process writes it beside its place, under a lock, and the others wait and then use it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

try:
    import fcntl
except ImportError:  # Windows has no file locks of this kind, so two processes may write the same file there
    fcntl = None  # type: ignore[assignment]


T = TypeVar("T")


def first_kept(
    paths: Sequence[Path], read: Callable[[Path, bool], T | None], write: Callable[[int, Path], None]
) -> tuple[T, Path | None]:
    """Returns the content of the first of these files that exists and is valid. Otherwise it is made, in the first that can be
    written, or else in a temporary file, for which the path is None. One process makes it, and the others wait.

    Args:
        read: reads a file; None if it does not hold what is wanted. False: this process has written it, so that it needs no
            check.
        write: writes into an open file; the path is the one that the file will have.

    Raises OSError if even a temporary file cannot be written.
    """
    for path in paths:
        if (kept := read(path, True)) is not None:
            return kept, path
    for path in paths:
        with suppress(OSError):
            return _made(path, read, write), path
    with tempfile.TemporaryDirectory() as folder:
        return _made(Path(folder) / paths[0].name, read, write), None


def _made(path: Path, read: Callable[[Path, bool], T | None], write: Callable[[int, Path], None]) -> T:
    """Raises OSError if nothing can be written."""
    made: list[T] = []

    def is_made() -> bool:
        made[:] = [kept for kept in [read(path, True)] if kept is not None]
        return bool(made)

    with open_part(path, lambda: None, is_made) as file:
        if file is not None:
            try:
                write(file, path)
                complete(file, path)
            except BaseException:
                part_of(path).unlink(missing_ok=True)
                raise
    kept = made[0] if made else read(path, False)
    if kept is None:
        raise OSError(None, "it was changed by another process while it was made", str(path))
    return kept


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
