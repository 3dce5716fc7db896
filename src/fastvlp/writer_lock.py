"""A lock that one process at a time holds to write to a folder."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fastvlp.errors import UserError, remedy

try:
    import fcntl
except ImportError:  # Windows, where nothing keeps a second process from writing
    fcntl = None  # type: ignore[assignment]


class WriterLock:
    """Is taken with the first write, and kept until it is closed or the process ends, however it ends.

    Args:
        path: The file that is locked; it is made where there is none.
        refusal: The error where another process, whose number is given, holds the lock.
    """

    def __init__(self, path: Path, refusal: Callable[[str], UserError]):
        self.path, self.refusal = path, refusal
        self._file: int | None = None

    def take(self) -> None:
        """Raises the refusal where another process holds it, and UserError if the folder is not writable."""
        if self._file is not None or fcntl is None:
            return
        with self._writable():
            file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.read(file, 32).decode(errors="replace").strip() or "unknown"
            os.close(file)
            raise self.refusal(holder) from error
        self._file = file
        if not self.is_in_place():
            # Its last holder removed the file between our opening and locking it.
            self.close()
            self.take()
        with self._writable():
            os.ftruncate(self._file, 0)
            os.pwrite(self._file, f"{os.getpid()}\n".encode(), 0)

    @contextmanager
    def _writable(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.close(remove=True)
            advice = remedy(error, "choose another folder")
            raise UserError(f"{self.path.parent}: cannot write ({error.strerror}); {advice}") from error

    def is_in_place(self) -> bool:
        """Whether the folder is still the one that was locked: it was neither removed nor renamed."""
        if self._file is None:
            return True
        try:
            return os.path.samestat(os.fstat(self._file), self.path.stat())
        except OSError:
            return False

    def close(self, *, remove: bool = False) -> None:
        """Lets another process write. `remove`: the file goes too; only where nobody waits for the lock."""
        if self._file is not None:
            if remove and self.is_in_place():
                # Where the folder cannot be written any more, the file stays; it locks nothing once it is closed.
                with suppress(OSError):
                    self.path.unlink(missing_ok=True)
            os.close(self._file)
            self._file = None
