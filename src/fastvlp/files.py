"""Files written whole or not at all, and read only where they are plain and of a plausible size."""

from __future__ import annotations

import os
import shutil
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fastvlp.errors import UserError, remedy

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

# The largest single thing that is read whole: no picture has a gigabyte.
MOST_BYTES = 1 << 30


class TooLargeError(OSError):
    """A file is larger than anything of its kind can be."""


class NoPlainFileError(OSError):
    """A pipe, a socket or a device, on which reading could wait for ever."""


def read_plain(path: Path, most: int = MOST_BYTES) -> bytes:
    """The bytes of a file. Raises OSError, such as TooLargeError for more than `most` bytes or NoPlainFileError for a pipe."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise (IsADirectoryError if stat.S_ISDIR(status.st_mode) else NoPlainFileError)(
            None, "no plain file", str(path)
        )
    if status.st_size > most:
        raise TooLargeError(None, f"{status.st_size} bytes are more than the {most} allowed", str(path))
    return path.read_bytes()


@contextmanager
def whole_file(path: Path, temporary: str) -> Iterator[Path]:
    """Yields a path beside `path`, named `temporary`, to write to; renames it when the block ends.

    An error inside the block leaves an older file as it was. Raises UserError if the disk is full or the folder not
    writable.
    """
    part = path.with_name(temporary)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # One that a killed process left would lend its rights.
        part.unlink(missing_ok=True)
        part.touch()
        mode = stat.S_IMODE(part.stat().st_mode)
        yield part
        # Some libraries, such as safetensors, make a file that only its owner can read.
        part.chmod(mode)
        with part.open("rb+") as file:
            # Renamed before its bytes are on the disk, a file can be empty after a power cut.
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        advice = remedy(error, "free space or choose another folder")
        raise UserError(f"{path}: cannot write ({error.strerror}); {advice}") from error
    finally:
        # Where the folder cannot be written, nothing can be removed from it either.
        with suppress(OSError):
            part.unlink(missing_ok=True)


def write_whole(path: Path, data: bytes) -> None:
    """Writes beside `path`, then renames. Raises UserError if the disk is full or the folder not writable."""
    # Loader workers, or a thread that saves, may write the same file at once: each has a temporary file of its own.
    with whole_file(path, f"{path.name}.{os.getpid()}.{threading.get_native_id()}.tmp") as part:
        part.write_bytes(data)


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """Yields a path beside `out` to make a folder of; it gets its name when the block ends: it is there whole or not at all.

    Raises UserError if something is there already, the disk is full or the place not writable.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: something is here already; choose another folder, or remove it")
    part = out.with_name(f"{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        yield part
        part.rename(out)
    except OSError as error:
        raise UserError(f"{out}: cannot write ({error.strerror}); {remedy(error, 'choose another folder')}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def most_open() -> int:
    """Returns the number of files that a reader may keep open: at most a quarter of those that the process may open."""
    if resource is None:
        return 256
    return min(256, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4)
