"""Protects the folder of a run: only one process writes to it, and it must not be moved."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from fastvlp import dist
from fastvlp.errors import UserError, remedy
from fastvlp.writer_lock import WriterLock

LOCK = "writer.lock"


@contextmanager
def locked(folder: Path) -> Iterator[WriterLock]:
    """Context in which no other process may train into the folder. Unfinished files of a killed process are removed.

    Raises UserError, on every rank, if another process trains into the folder, or if it cannot be written to.
    """
    lock = WriterLock(folder / LOCK, lambda holder: _refusal(folder, holder))
    with dist.together(torch.device("cpu")):
        if dist.is_main():
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                advice = remedy(error, "choose another folder with `out`")
                raise UserError(f"{folder}: cannot make this folder ({error.strerror}); {advice}") from error
            lock.take()
            remove_unfinished(folder)
    try:
        yield lock
    finally:
        lock.close(remove=True)
        if dist.is_main():
            # A run that could not begin leaves no folder.
            with suppress(OSError):
                folder.rmdir()


def _refusal(folder: Path, holder: str) -> UserError:
    return UserError(
        f"{folder}: another process (id {holder}) trains into this folder; wait until it ends, stop it, or choose another `out`"
    )


def remove_unfinished(folder: Path) -> None:
    """Removes files that a killed process had begun to write. Files of a process that still runs are kept."""
    for path in folder.glob("*.tmp"):
        owner = path.suffixes[-2].removeprefix(".") if len(path.suffixes) > 1 else ""
        if not (owner.isdecimal() and _runs(int(owner))):
            with suppress(OSError):
                path.unlink()


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except OverflowError:
        return False
    except OSError as error:
        return isinstance(error, PermissionError)
    return True


def check_in_place(lock: WriterLock | None) -> None:
    """Raises UserError if the folder of a run was removed or renamed since the run began."""
    if lock is not None and not lock.is_in_place():
        raise UserError(
            f"{lock.path.parent}: the folder was removed or renamed during the run; nothing more is saved there"
        )
