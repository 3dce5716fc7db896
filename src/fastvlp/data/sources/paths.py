"""Paths that a source names: read only inside the folder that the user pointed at."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from fastvlp.batch import Dropped, Record
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
        return Dropped(key=key, reason=f"image file is missing in {root.resolve()}")
    except (OSError, ValueError) as error:
        return Dropped(key=key, reason=f"image file cannot be read ({type(error).__name__})")


def pictured(key: str, info: Mapping[str, Any], root: Images, *names: str) -> Record | Dropped:
    """A record with these images; Dropped as of `read_inside` where one cannot be had."""
    images = [read_inside(root, name, key) for name in names]
    lost = next((image for image in images if isinstance(image, Dropped)), None)
    return lost or Record(key=key, images=tuple(image for image in images if isinstance(image, bytes)), info=info)


def read_json(path: Path) -> Any:
    """A JSON file whole; UserError where it is none."""
    try:
        return json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error}); copy the file again") from None


@contextmanager
def in_form(path: Path, form: str) -> Iterator[None]:
    """What only a file of another form can cause becomes a UserError that says so."""
    try:
        yield
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{path}: not in the form of {form} ({type(error).__name__}: {error}); name its format with --format"
        ) from None


def xyxy(box: Any) -> list[float]:
    """COCO's boxes are x, y, width, height."""
    x, y, width, height = box
    return [x, y, x + width, y + height]


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
