"""Files written whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fastvlp.errors import UserError


@contextmanager
def whole_file(path: Path, temporary: str) -> Iterator[Path]:
    """Yields a path beside `path`, named `temporary`, to write to; renames it when the block ends.

    An error inside the block leaves an older file as it was. Raises UserError where the disk is full or the folder not
    writable.
    """
    part = path.with_name(temporary)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        with part.open("rb+") as file:
            # Renamed before its bytes are on the disk, a file can be empty after a power cut.
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        raise UserError(f"{path}: cannot write ({error.strerror}); free space or choose another folder") from error
    finally:
        part.unlink(missing_ok=True)


def write_whole(path: Path, data: bytes) -> None:
    """Writes beside `path`, then renames. Raises UserError where the disk is full or the folder not writable."""
    # Loader workers may build the same index at once: each has a temporary file of its own.
    with whole_file(path, f"{path.name}.{os.getpid()}.tmp") as part:
        part.write_bytes(data)


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """Yields a path beside `out` to make a folder of; it gets its name when the block ends: it is there whole or not at all.

    Raises UserError where something is there already, the disk is full or the place not writable.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: something is here already; choose another folder, or remove it")
    part = out.with_name(f"{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        yield part
        part.rename(out)
    except OSError as error:
        raise UserError(f"{out}: cannot write ({error.strerror}); choose another folder") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
