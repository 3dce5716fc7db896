"""Files written whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

from fastvlp.errors import UserError


def write_whole(path: Path, data: bytes) -> None:
    """Writes beside `path`, then renames. Raises UserError where the disk is full or the folder not writable."""
    part = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(data)
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot write ({error.strerror}); free space or choose another folder") from error
