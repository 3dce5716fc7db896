"""A folder of images, each with a `.txt` or `.json` of the same name beside it; in a `.txt` one caption a line."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastvlp.batch import Dropped, Record
from fastvlp.data.records.captions import CAPTION_SUFFIXES, caption_texts, merge_captions
from fastvlp.data.sources.interface import Item, Match, Note, Source
from fastvlp.data.sources.source_files import IMAGE_SUFFIXES, walk_files
from fastvlp.files import read_plain
from fastvlp.plain_json import parse_json


@dataclass(frozen=True, kw_only=True)
class FolderSource(Source):
    """Images and their captions in files beside them."""

    name = "folder"
    summary = "a folder of images, each with a .txt (one caption per line) or a .json of the same name beside it"

    @classmethod
    def match(cls, path: Path) -> Match:
        return Match.CONTENTS if path.is_dir() and _images(path) else Match.NONE

    def read(self, path: Path) -> Iterator[Item]:
        """Yields one record an image, sub-folders and links included, in the order of their names."""
        notes: list[Note] = []
        files = walk_files(path, notes)
        yield from notes
        images = [file for file in files if file.suffix.lower() in IMAGE_SUFFIXES]
        texts = {file for file in files if file.suffix.lower() in _TEXTS}
        used = set[Path]()
        lacking = "no .txt beside the image" + ("" if texts else "; where folders are classes, the `format` is classes")
        for file in images:
            name = file.relative_to(path).as_posix()
            key = name.removesuffix(file.suffix)
            # `1.jpg.txt` is beside `1.jpg` too.
            beside = [text for stem in (key, name) for text in _beside(path / stem, texts)]
            used |= {*beside}
            try:
                if not beside:
                    yield Dropped(key=key, reason=lacking, file=name)
                    continue
                yield Record(key=key, images=(read_plain(file),), info=_info(beside), file=name)
            except UnicodeDecodeError:
                yield Dropped(key=key, reason="its .txt is not UTF-8", file=name)
            except ValueError:
                yield Dropped(key=key, reason="its .json is not JSON", file=name)
            except OSError as error:
                yield Dropped(key=key, reason=f"image or text cannot be read ({type(error).__name__})", file=name)
        for file in files:
            if file not in used and file.suffix.lower() not in IMAGE_SUFFIXES:
                kind = f"files ending in {file.suffix}" if file.suffix else "files without an ending"
                text = f"{file.suffix} files without an image" if file in texts else f"{kind} are not read"
                yield Note(text=text, example=file.relative_to(path).as_posix())

    def count(self, path: Path) -> int:
        return len(_images(path))


_TEXTS = tuple(f".{suffix}" for suffix in (*CAPTION_SUFFIXES, "json"))


def _images(path: Path) -> list[Path]:
    return [file for file in walk_files(path) if file.suffix.lower() in IMAGE_SUFFIXES]


def _beside(stem: Path, texts: set[Path]) -> list[Path]:
    names = (stem.with_name(stem.name + suffix) for suffix in (*_TEXTS, *map(str.upper, _TEXTS)))
    return [name for name in names if name in texts]


def _info(beside: list[Path]) -> dict[str, Any]:
    """The captions, and the other fields of a .json."""
    info: Any = {}
    lines: list[str] = []
    for file in beside:
        text = read_plain(file).decode("utf-8-sig")
        if file.suffix.lower() != ".json":
            lines += text.splitlines()
            continue
        info = parse_json(text)
        info = info if isinstance(info, dict) else {"captions": caption_texts(info)}
    return merge_captions(info, lines if any(map(str.strip, lines)) or not info else None)
