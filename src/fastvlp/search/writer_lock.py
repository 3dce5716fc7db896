"""A lock that one process at a time holds to write to a folder."""

from __future__ import annotations

import os
from pathlib import Path

from fastvlp.search.checks import EngineError

try:
    import fcntl
except ImportError:  # Windows, where nothing keeps a second process from writing
    fcntl = None  # type: ignore[assignment]


class WriterLock:
    """Is taken with the first write, and kept until it is closed or the process ends, however it ends."""

    def __init__(self, path: Path):
        self.path = path
        self._file: int | None = None

    def take(self) -> None:
        """Raises EngineError where another process holds it."""
        if self._file is not None or fcntl is None:
            return
        file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.read(file, 32).decode(errors="replace").strip() or "unknown"
            os.close(file)
            raise EngineError(
                f"{self.path.parent}: another process (number {holder}) writes to this index; stop it, add through its "
                f"`vlp serve`, or keep the index on a server"
            ) from error
        os.ftruncate(file, 0)
        os.pwrite(file, f"{os.getpid()}\n".encode(), 0)
        self._file = file

    def close(self) -> None:
        """Lets another process write."""
        if self._file is not None:
            os.close(self._file)
            self._file = None
