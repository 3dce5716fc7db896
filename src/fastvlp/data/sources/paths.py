"""Paths that a source names: read only inside the folder that the user pointed at."""

from __future__ import annotations

import io
from functools import lru_cache
from pathlib import Path
from typing import Literal

from PIL import Image

from fastvlp.batch import Dropped
from fastvlp.errors import UserError

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"})


# Where images are, or that there are none: a model that reads stored regions alone never looks at them.
Images = Path | Literal["blank"]


@lru_cache
def blank() -> bytes:
    """What stands for an image that nobody has: the smallest that is decoded, of one colour."""
    file = io.BytesIO()
    Image.new("RGB", (2, 2), "gray").save(file, "PNG")
    return file.getvalue()


def read_inside(root: Images, name: str, key: str) -> bytes | Dropped:
    """The bytes of `root/name`; Dropped when it is missing or when the path, links followed, leaves `root`."""
    if root == "blank":
        return blank()
    assert isinstance(root, Path)
    try:
        path = (root / name).resolve()
        if not path.is_relative_to(root.resolve()):
            return Dropped(key=key, reason="image path leaves the source folder (see --images)")
        return path.read_bytes()
    except FileNotFoundError:
        return Dropped(key=key, reason="image file is missing")
    except (OSError, ValueError) as error:
        return Dropped(key=key, reason=f"image file cannot be read ({type(error).__name__})")


def read_text(path: Path) -> str:
    """A text file as UTF-8, a byte-order mark taken off; UserError when it is anything else."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: byte {error.start} is not UTF-8; convert it with `iconv -f ITS_ENCODING -t UTF-8`"
        ) from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
