"""Reads the files of a source: images only inside of the folder that the user gave, text as UTF-8, and JSON in the expected
form."""

from __future__ import annotations

import io
import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import IO, Any
from urllib.parse import unquote

from PIL import Image

from fastvlp.batch import Dropped, Record
from fastvlp.data.sources.interface import Note
from fastvlp.errors import UserError
from fastvlp.files import read_plain
from fastvlp.plain_json import parse_json

IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
    | {".avif", ".heic", ".heif"}
)
# Size limits: of a line, which may hold a picture in base64, and of a text or JSON file, such as the instances of COCO.
MOST_LINE = 1 << 27
MOST_TEXT = 1 << 33
_MISSING = "image file is missing"
_URL = re.compile(r"(?:https?|ftp|s3|gs|hf)://", re.IGNORECASE)
URL_REASON = "its image is a URL; download the images first (`img2dataset`), then import the folder of tars"


@lru_cache
def blank_image() -> bytes:
    """Returns a placeholder for a missing image: the smallest image that is decoded, of one colour."""
    file = io.BytesIO()
    Image.new("RGB", (2, 2), "gray").save(file, "PNG")
    return file.getvalue()


def read_image(root: Path | None, name: str, key: str) -> bytes | Dropped:
    """Returns the bytes of the image that a source calls `name`, in the folder `root`; links are followed. Returns Dropped,
    with the name `key`, if the image is missing or its path is outside of `root`; and a blank image if `root` is None.

    The image is also found if the name has backslashes, another Unicode form, %20, or small instead of capital letters.
    """
    if root is None:
        return blank_image()
    if is_url(name):
        return Dropped(key=key, reason=URL_REASON, file=name)
    try:
        path = find_image(root, name)
        if path is None:
            return Dropped(
                key=key, reason="image path leaves the source folder (`images` can name another one)", file=name
            )
        return read_plain(path)
    except FileNotFoundError:
        return Dropped(key=key, reason=f"{_MISSING} in {root.resolve()}", file=name)
    except (OSError, ValueError) as error:
        return Dropped(key=key, reason=f"image file cannot be read ({type(error).__name__})", file=name)


def is_missing(dropped: Dropped) -> bool:
    """Whether `read_image` found no file of that name."""
    return dropped.reason.startswith(_MISSING)


def is_url(name: str) -> bool:
    """Whether an image's name is an address on the web or in a cloud."""
    return bool(_URL.match(name.strip()))


def find_image(root: Path, name: str) -> Path | None:
    """Returns the path of `name` in `root`, whether or not it exists; None if the name is outside of `root`."""
    top = _absolute(root)
    for spelling in dict.fromkeys((name, name.replace("\\", "/"), unquote(name), unquote(name.replace("\\", "/")))):
        path = _absolute(top / spelling)
        if not path.is_relative_to(top):
            # The folder may also be a link.
            real = (top / spelling).resolve()
            if not real.is_relative_to(top.resolve()):
                return None
            path = real
        if is_there(path):
            return path
        if (similar := _similar_path(top, path)) is not None:
            return similar
    return _absolute(top / name)


def is_there(path: Path) -> bool:
    """Whether a file or a folder exists. No error is raised for a name that a file cannot have."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def _absolute(path: Path) -> Path:
    """Returns the path without `..`, without following links."""
    return Path(os.path.abspath(path))  # noqa: PTH100 (`resolve` follows links)


def _similar_path(top: Path, path: Path) -> Path | None:
    """Returns the only path below `top` whose names differ from those of `path` only in Unicode form or in capital letters."""
    place = top
    for part in path.relative_to(top).parts:
        if not is_there(place / part):
            names = _names_by_plain(str(place), place.stat().st_mtime_ns if place.is_dir() else 0).get(_plain(part), [])
            if len(names) != 1:
                return None
            part = names[0]
        place = place / part
    return place


@lru_cache(maxsize=256)
def _names_by_plain(folder: str, mtime_ns: int) -> dict[str, list[str]]:
    names: dict[str, list[str]] = {}
    with suppress(OSError):
        for file in Path(folder).iterdir():
            names.setdefault(_plain(file.name), []).append(file.name)
    return names


def _plain(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def walk_files(folder: Path, notes: list[Note] | None = None) -> list[Path]:
    """Yields all files below a folder in the order of their names. Links are followed; a link to a folder that contains it
    is left out, with a note."""
    files: list[Path] = []
    notes = [] if notes is None else notes
    above: dict[Path, frozenset[tuple[int, int]]] = {folder: frozenset()}

    def unreadable(error: OSError) -> None:
        notes.append(Note(text=f"folders that cannot be read ({error.strerror})", example=str(error.filename)))

    for name, folders, names in os.walk(folder, onerror=unreadable, followlinks=True):
        place = Path(name)
        stat = place.stat()
        own, ancestors = (stat.st_dev, stat.st_ino), above.pop(place)
        if own in ancestors:
            folders.clear()
            notes.append(Note(text="links that lead back to a folder they are in are not followed", example=name))
            continue
        above |= {place / inner: ancestors | {own} for inner in folders}
        files += [place / file for file in names]
    return sorted(files)


def image_record(key: str, info: Mapping[str, Any], root: Path | None, *names: str) -> Record | Dropped:
    """Returns a record with the images `names` in the folder `root`; Dropped, like `read_image`, if one cannot be read."""
    if wrong := [name for name in names if not isinstance(name, str)]:
        return Dropped(key=str(key), reason=f"image name {str(wrong[0])[:40]!r} is no text")
    images = [read_image(root, name, key) for name in names]
    dropped = next((image for image in images if isinstance(image, Dropped)), None)
    read = tuple(image for image in images if isinstance(image, bytes))
    return dropped or Record(key=key, images=read, info=info, file=names[0])


def read_text(path: Path) -> str:
    """Reads a text file in UTF-8, without its byte-order mark. Raises UserError if it is not one."""
    try:
        return read_plain(path, MOST_TEXT).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: byte {error.start} is not UTF-8; convert it with `iconv -f ITS_ENCODING -t UTF-8`"
        ) from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None


def read_json(path: Path) -> Any:
    """Reads a whole JSON file. Raises UserError if it is not one."""
    try:
        return parse_json(read_text(path))
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); copy the file again") from None


def read_json_lines(path: Path) -> Iterator[dict[str, Any] | Dropped]:
    """Reads one JSON object from each line; blank lines are skipped. Any other line becomes a Dropped with the name of the file
    and the number of the line."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(_lines(file), 1):
                place = f"{path.name}:{number}"
                if line is None:
                    yield Dropped(key=place, reason=f"line is longer than {MOST_LINE} bytes")
                    continue
                try:
                    text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                    if not text.strip():
                        continue
                    row = parse_json(text)
                except UnicodeDecodeError:
                    yield Dropped(key=place, reason="line is not UTF-8; convert the file with `iconv -t UTF-8`")
                    continue
                except ValueError as error:
                    yield Dropped(key=place, reason=f"line is not JSON ({getattr(error, 'msg', str(error))})")
                    continue
                is_object = isinstance(row, dict)
                yield row if is_object else Dropped(key=place, reason="line is JSON and not an object {...}")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None


def _lines(file: IO[bytes]) -> Iterator[bytes | None]:
    """Yields the lines of a file; None for a line that is too long to be read."""
    while line := file.readline(MOST_LINE + 1):
        if len(line) <= MOST_LINE:
            yield line
            continue
        while line and not line.endswith(b"\n"):
            line = file.readline(MOST_LINE)
        yield None


def number_of_lines(path: Path) -> int:
    """Counts the lines of a file that are not blank."""
    with path.open("rb") as file:
        return sum(1 for line in file if line.strip())


# The exceptions that are raised when a row has another form.
FORM_ERRORS = (KeyError, IndexError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError)


def form_fault(error: Exception) -> str:
    """Returns the reason why a row is dropped, from one of FORM_ERRORS."""
    return f"row is not in the format's form ({type(error).__name__}: {str(error)[:80]})"


def each_row(rows: Iterable[Any], name: str, read: Callable[[Any], None]) -> Iterator[Dropped]:
    """Calls `read` with every row. Yields a Dropped for each entry that is not a row or for which `read` raises an error, with
    `name` and its number (or its line)."""
    for number, row in enumerate(rows, 1):
        if isinstance(row, Dropped):
            yield row
            continue
        try:
            read(row)
        except FORM_ERRORS as error:
            yield Dropped(key=f"{name}:{number}", reason=form_fault(error))


@contextmanager
def expect_form(path: Path, form: str) -> Iterator[None]:
    """Turns errors that only a file of another form can cause into a UserError that says so."""
    try:
        yield
    except FORM_ERRORS as error:
        raise UserError(
            f"{path}: not in the form of {form} ({type(error).__name__}: {error}); if it is in another, name its `format`"
        ) from None


def to_corners(box: Any) -> list[float]:
    """Converts COCO's box x, y, width, height to x0, y0, x1, y1."""
    x, y, width, height = box
    return [x, y, x + width, y + height]
