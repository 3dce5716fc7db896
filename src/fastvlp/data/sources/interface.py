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
    """How certain it is that a path has a format. A path is read in the format with the highest value."""

    NONE = 0
    """The path does not have the format."""
    CONTENTS = 1
    """The folder has files that many formats have, such as images."""
    SUFFIX = 2
    """The file, or the files in the folder, have the file extension of the format."""
    NAMES = 3
    """The files have names that only this format uses."""


@dataclass(frozen=True, kw_only=True)
class Note:
    """A note about a part of a source that an import leaves out or changes and that is not a record: a column, a member of a
    tar, a file. Notes with the same text are counted together.

    Attributes:
        text: what was left out or changed, without the name of the part.
        example: name of the part.
    """

    text: str
    example: str = ""


# The items that a format yields.
Item = Record | Dropped | Note


@dataclass(frozen=True, kw_only=True)
class Source(abc.ABC):
    """A data format that can be imported, with its options.

    A format is a frozen dataclass. Its fields are its options: keyword arguments of `import_data`, and options of `vlp data
    import` for a path of this format. Each has a default and, in a string below it, its help text.

    Attributes:
        name: name of the format, the value of `format`.
        summary: a line for the list of formats.
    """

    name: ClassVar[str]
    summary: ClassVar[str]

    @classmethod
    @abc.abstractmethod
    def match(cls, path: Path) -> Match:
        """Returns how certain it is that an existing file or folder has this format. It looks at names, and reads no file."""

    @abc.abstractmethod
    def read(self, path: Path) -> Iterator[Item]:
        """Yields the records at `path`; a `Dropped` with the reason for each record that cannot be read; and a `Note` for
        everything else that is left out. A bad record does not end the reading. Raises UserError if a whole file cannot be
        read.

        If a record has `info["split"]`, it goes to this split. Records with the same `info["group"]` go to the same split.
        """

    def count(self, path: Path) -> int | None:
        """Returns the number of items that `read` yields, for a progress bar; None if counting takes as long as reading."""
        return None


@dataclass(frozen=True, kw_only=True)
class ImagePathSource(Source):
    """A format that names its images by their paths."""

    images: Literal["blank"] | Path | None = None
    """Folder to which the image paths are relative; by default the folder of the file that names them. `blank`: there are no
    images, for models that read only stored regions."""

    def __post_init__(self) -> None:
        if self.images not in (None, "blank") and not Path(str(self.images)).is_dir():
            raise UserError(
                f"`images` {self.images}: no such folder; give the folder to which image paths are relative"
            )

    def image_folder(self, usual: Path) -> Path | None:
        """Returns the folder to which image paths are relative, by default `usual`; None if there are no images."""
        if self.images == "blank":
            return None
        return usual if self.images is None else Path(self.images)


@dataclass(frozen=True, kw_only=True)
class AnnotationSource(ImagePathSource):
    """A published data set: annotation files, and images beside them or in another folder."""

    @classmethod
    @abc.abstractmethod
    def files(cls, path: Path) -> Sequence[Path]:
        """Returns the annotation files at `path`, which may be one of them; empty if there are none."""

    @abc.abstractmethod
    def records(self, path: Path) -> Iterator[Item]:
        """Yields the items, like `read`. It is called only if there are annotation files."""

    @classmethod
    def match(cls, path: Path) -> Match:
        return Match.NAMES if path.is_dir() and cls.files(path) else Match.NONE

    def read(self, path: Path) -> Iterator[Item]:
        if not self.files(path):
            raise UserError(f"{path}: nothing of the format {self.name} is here; it expects {self.summary}")
        return self.records(path)
