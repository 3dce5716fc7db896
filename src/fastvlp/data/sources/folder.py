"""A folder of images, each with a `.txt` of the same name beside it, one caption a line."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from fastvlp.batch import Dropped, Record
from fastvlp.data.sources.paths import IMAGE_SUFFIXES, read_inside


def read(path: Path) -> Iterator[Record | Dropped]:
    """Yields one record an image, sub-folders included, in the order of their names."""
    for file in _images(path):
        name = file.relative_to(path).as_posix()
        key = name.removesuffix(file.suffix)
        try:
            lines = file.with_suffix(".txt").read_text(encoding="utf-8-sig").splitlines()
        except FileNotFoundError:
            yield Dropped(key=key, reason="no .txt beside the image")
            continue
        except UnicodeDecodeError:
            yield Dropped(key=key, reason="its .txt is not UTF-8")
            continue
        image = read_inside(path, name, key)
        yield image if isinstance(image, Dropped) else Record(key=key, images=(image,), info={"captions": lines})


def count(path: Path) -> int:
    """How many items `read` will yield."""
    return len(_images(path))


def _images(path: Path) -> list[Path]:
    return sorted(file for file in path.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file())
