"""The interface of the formats that can be imported. A format is a class derived from `Source`, in a file of this package or
in a file of your own.

A format of your own needs no change to the package: `vlp --import my_format.py data import PATH --out FOLDER` recognises its
paths and takes its options.
"""

from __future__ import annotations

import abc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import ClassVar, Literal

from fastvlp.batch import Dropped, Record
from fastvlp.errors import UserError


class Match(IntEnum):
    """How surely a path has a format. A path is read in the format that is surest of it."""

    NONE = 0
    """It does not have the format."""
    CONTENTS = 1
    """A folder holds files that many formats have, such as images."""
    SUFFIX = 2
    """A file, or the files in a folder, end as those of the format do."""
    NAMES = 3
    """The files are named as only this format names them."""


@dataclass(frozen=True, kw_only=True)
class Note:
    """Something of a source that an import leaves out or changes, and that is no record: a column, a member of a tar, a file.
    Notes of one text are counted together.

    Attributes:
        text: what happened, without the name of the single thing.
        example: the thing it happened to.
    """

    text: str
    example: str = ""


# What a format yields.
Item = Record | Dropped | Note


@dataclass(frozen=True, kw_only=True)
class Source(abc.ABC):
    """A format that can be imported, with its options.

    A format is a frozen dataclass. Its fields are its own options: keyword arguments of `import_data`, and options of `vlp
    data import` for a path of this format. Each has a default, and a string below it as its help.

    Attributes:
        name: what `format` calls it.
        summary: a line for the list of formats.
    """

    name: ClassVar[str]
    summary: ClassVar[str]

    @classmethod
    @abc.abstractmethod
    def match(cls, path: Path) -> Match:
        """How surely an existing file or folder has this format. Looks at names, and reads no file."""

    @abc.abstractmethod
    def read(self, path: Path) -> Iterator[Item]:
        """Yields the records at `path`, the names of those that cannot be read, with the reason, and notes of whatever else is
        left out. One bad record never ends the reading; UserError is for a file that cannot be read at all.

        `info["split"]`, where a record has it, is the split it goes to; records with the same `info["group"]` always go to
        the same split.
        """

    def count(self, path: Path) -> int | None:
        """How many items `read` yields, for a progress bar; None where that takes as long as reading."""
        return None


@dataclass(frozen=True, kw_only=True)
class ImagePathSource(Source):
    """A format that names its images by their paths."""

    images: Literal["blank"] | Path | None = None
    """Folder that the image paths start from; by default beside the file that names them. `blank`: there are no images, and a
    model that reads stored regions alone needs none."""

    def __post_init__(self) -> None:
        if self.images not in (None, "blank") and not Path(str(self.images)).is_dir():
            raise UserError(f"`images` {self.images}: no such folder; give the one that image paths start from")

    def image_folder(self, usual: Path) -> Path | None:
        """The folder that image paths start from, `usual` where no other was given; None where there are no images."""
        if self.images == "blank":
            return None
        return usual if self.images is None else Path(self.images)


@dataclass(frozen=True, kw_only=True)
class AnnotationSource(ImagePathSource):
    """A published set: files of annotations, and images beside them or in another folder."""

    @classmethod
    @abc.abstractmethod
    def files(cls, path: Path) -> Sequence[Path]:
        """The files of annotations at `path`, which may be one of them; empty where there are none."""

    @abc.abstractmethod
    def records(self, path: Path) -> Iterator[Item]:
        """`read`, where there are files."""

    @classmethod
    def match(cls, path: Path) -> Match:
        return Match.NAMES if path.is_dir() and cls.files(path) else Match.NONE

    def read(self, path: Path) -> Iterator[Item]:
        if not self.files(path):
            raise UserError(f"{path}: nothing of the format {self.name} is here, which is {self.summary}")
        return self.records(path)
