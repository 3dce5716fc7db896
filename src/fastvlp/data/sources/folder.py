"""A folder of images, each with a `.txt` of the same name beside it, one caption a line."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fastvlp.batch import Dropped, Record
from fastvlp.data.sources.interface import Match, Source
from fastvlp.data.sources.source_files import IMAGE_SUFFIXES, read_image


@dataclass(frozen=True, kw_only=True)
class FolderSource(Source):
    """Images and their captions in files beside them."""

    name = "folder"
    summary = "images with a .txt of the same name beside each, one caption a line"

    @classmethod
    def match(cls, path: Path) -> Match:
        return Match.CONTENTS if any(file.suffix.lower() in IMAGE_SUFFIXES for file in path.rglob("*")) else Match.NONE

    def read(self, path: Path) -> Iterator[Record | Dropped]:
        """Yields one record an image, sub-folders included, in the order of their names."""
        for file in _images(path):
            name = file.relative_to(path).as_posix()
            key = name.removesuffix(file.suffix)
            try:
                captions = file.with_suffix(".txt").read_text(encoding="utf-8-sig").splitlines()
            except FileNotFoundError:
                yield Dropped(key=key, reason="no .txt beside the image")
                continue
            except UnicodeDecodeError:
                yield Dropped(key=key, reason="its .txt is not UTF-8")
                continue
            image = read_image(path, name, key)
            if isinstance(image, Dropped):
                yield image
            else:
                yield Record(key=key, images=(image,), info={"captions": captions})

    def count(self, path: Path) -> int:
        return len(_images(path))


def _images(path: Path) -> list[Path]:
    return sorted(file for file in path.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file())
