"""Reading the files of a source: images only inside the folder that the user gave, text as UTF-8, JSON in the expected form."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image

from fastvlp.batch import Dropped, Record
from fastvlp.errors import UserError

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"})


@lru_cache
def blank_image() -> bytes:
    """A stand-in for an image that nobody has: the smallest that is decoded, of one colour."""
    file = io.BytesIO()
    Image.new("RGB", (2, 2), "gray").save(file, "PNG")
    return file.getvalue()


def read_image(root: Path | None, name: str, key: str) -> bytes | Dropped:
    """The bytes of `root/name`. Dropped, called `key`, where it is missing and where the path, links followed, leaves `root`.
    A blank image where `root` is None."""
    if root is None:
        return blank_image()
    try:
        path = (root / name).resolve()
        if not path.is_relative_to(root.resolve()):
            return Dropped(key=key, reason="image path leaves the source folder (`images` can name another one)")
        return path.read_bytes()
    except FileNotFoundError:
        return Dropped(key=key, reason=f"image file is missing in {root.resolve()}")
    except (OSError, ValueError) as error:
        return Dropped(key=key, reason=f"image file cannot be read ({type(error).__name__})")


def image_record(key: str, info: Mapping[str, Any], root: Path | None, *names: str) -> Record | Dropped:
    """A record with the images `names` in the folder `root`; Dropped, as of `read_image`, where one cannot be read."""
    images = [read_image(root, name, key) for name in names]
    dropped = next((image for image in images if isinstance(image, Dropped)), None)
    return dropped or Record(key=key, images=tuple(image for image in images if isinstance(image, bytes)), info=info)


def read_text(path: Path) -> str:
    """A text file as UTF-8, without its byte-order mark. Raises UserError where it is anything else."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: byte {error.start} is not UTF-8; convert it with `iconv -f ITS_ENCODING -t UTF-8`"
        ) from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None


def read_json(path: Path) -> Any:
    """A whole JSON file. Raises UserError where it is none."""
    try:
        return json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error}); copy the file again") from None


def read_json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """One JSON object a line; blank lines are skipped. Raises UserError with file and line where there is anything else."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise UserError(f"{path}:{number}: expected a JSON object, found {type(row).__name__}")
                yield row
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{number}: not JSON ({error.msg}); one JSON object a line is expected") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8; convert it with `iconv -t UTF-8`") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None


@contextmanager
def expect_form(path: Path, form: str) -> Iterator[None]:
    """Turns errors that only a file of another form can cause into a UserError that says so."""
    try:
        yield
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{path}: not in the form of {form} ({type(error).__name__}: {error}); if it is in another, name its `format`"
        ) from None


def to_corners(box: Any) -> list[float]:
    """COCO's box x, y, width, height as x0, y0, x1, y1."""
    x, y, width, height = box
    return [x, y, x + width, y + height]
