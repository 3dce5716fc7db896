"""A folder for each class, with its images; or such folders for each split (ImageNet's layout)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from fastvlp.batch import Dropped, Record
from fastvlp.data.sources.interface import Item, Match, Note, Source
from fastvlp.data.sources.row_source import USUAL_FOLDERS
from fastvlp.data.sources.source_files import IMAGE_SUFFIXES, walk_files
from fastvlp.data.sources.split_names import USUAL, usual_split
from fastvlp.files import read_plain

# So many files tell whether images have texts beside them.
LOOKED_AT = 2000


@dataclass(frozen=True, kw_only=True)
class ClassFoldersSource(Source):
    """Images in folders that are called like their classes."""

    name = "classes"
    summary = "a folder with a sub-folder of images for each class, or with such folders for each split"

    @classmethod
    def match(cls, path: Path) -> Match:
        if not path.is_dir() or any(file.is_file() and _is_data(file) for file in path.iterdir()):
            return Match.NONE
        files = list(islice((file for folder in _folders(path) for file in walk_files(folder)), LOOKED_AT))
        images = [file for file in files if file.suffix.lower() in IMAGE_SUFFIXES]
        # A class without another one is no class; other files are captions or annotations.
        classes = {_place(file, path)[1] for file in images} - {""}
        plain = not any(_is_data(file) for file in files if file.suffix.lower() not in IMAGE_SUFFIXES)
        return Match.SUFFIX if plain and len(classes - {*USUAL_FOLDERS}) > 1 else Match.NONE

    def read(self, path: Path) -> Iterator[Item]:
        """Yields one record an image; its label is the name of its folder."""
        notes: list[Note] = []
        files = walk_files(path, notes)
        yield from notes
        for file in files:
            name = file.relative_to(path).as_posix()
            if file.suffix.lower() not in IMAGE_SUFFIXES:
                yield Note(text=f"files ending in {file.suffix or 'nothing'} are not read", example=name)
                continue
            key = name.removesuffix(file.suffix)
            split, label = _place(file, path)
            if not label:
                yield Dropped(key=key, reason="image is in no folder of a class", file=name)
                continue
            info = {"label": label} | ({"split": split} if split else {})
            try:
                yield Record(key=key, images=(read_plain(file),), info=info, file=name)
            except OSError as error:
                yield Dropped(key=key, reason=f"image cannot be read ({type(error).__name__})", file=name)

    def count(self, path: Path) -> int:
        return len(walk_files(path))


def _folders(path: Path) -> list[Path]:
    return sorted(file for file in path.iterdir() if file.is_dir())


def _is_data(file: Path) -> bool:
    """Whether a file is an image, or says something about images."""
    suffixes = {
        ".txt",
        ".json",
        ".jsonl",
        ".csv",
        ".tsv",
        ".parquet",
        ".tar",
        ".arrow",
        ".npz",
        ".xml",
        ".cap",
        ".caption",
    }
    return file.suffix.lower() in suffixes | IMAGE_SUFFIXES and file.name.lower() not in ("readme.txt", "license.txt")


def _place(file: Path, path: Path) -> tuple[str, str]:
    """Split and class that an image's folders name, empty if they name none."""
    folders = file.relative_to(path).parts[:-1]
    split = folders[0] if folders and usual_split(folders[0]) in USUAL else ""
    rest = folders[1:] if split else folders
    return split, rest[0] if rest else ""
