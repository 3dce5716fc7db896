"""The pictures of a benchmark as it was published: files in a folder or in a .zip, found by the names that its items use."""

from __future__ import annotations

import hashlib
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from fastvlp.batch import Dropped
from fastvlp.data.records.shards import RecordError
from fastvlp.data.sources.source_files import IMAGE_SUFFIXES, walk_files
from fastvlp.errors import UserError
from fastvlp.files import MOST_BYTES, read_plain

# Names of COCO's images are numbers of so many digits.
COCO_DIGITS = 12


class PictureFolder:
    """The pictures in a folder and its sub-folders, or in a .zip.

    Attributes:
        place: the folder or the .zip.
        names: path of each picture in it, in order.

    Raises UserError if there is neither, or no picture in it.
    """

    def __init__(self, place: Path):
        self.place = place
        self._zip = None if place.is_dir() else _open_zip(place)
        if self._zip is None:
            files = [file.relative_to(place).as_posix() for file in walk_files(place)]
        else:
            files = sorted(name for name in self._zip.namelist() if not name.startswith("__MACOSX/"))
        self.names = [name for name in files if PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES]
        if not self.names:
            raise UserError(f"{place}: no picture here; give the folder or the .zip with the pictures")

    @cached_property
    def _places(self) -> Mapping[str, Sequence[str]]:
        """The pictures that can be called by a name: their path, file name, or file name without its ending."""
        places: dict[str, list[str]] = {}
        for name in self.names:
            path = PurePosixPath(name)
            for spelling in {name, path.name, path.stem}:
                places.setdefault(spelling, []).append(name)
        return places

    def find(self, name: str | int) -> str | None:
        """The path of the picture that an item calls so: by its path, its file name with or without its ending, or the number
        of an image of COCO; None if there is no such picture.

        Raises UserError if there are several.
        """
        spellings = [str(name).replace("\\", "/"), PurePosixPath(str(name)).name]
        if str(name).isdecimal():
            spellings.append(str(name).zfill(COCO_DIGITS))
        for spelling in spellings:
            if found := self._places.get(spelling):
                if len(found) > 1 and spelling not in found:
                    raise UserError(
                        f"{self.place}: {len(found)} pictures are called {name} ({', '.join(found[:3])}); give the one folder "
                        f"that the items mean"
                    )
                return spelling if spelling in found else found[0]
        return None

    def read(self, name: str) -> bytes:
        """The bytes of a picture. Raises RecordError if it cannot be read."""
        try:
            if self._zip is None:
                return read_plain(self.place / name)
            size = self._zip.getinfo(name).file_size
            if size > MOST_BYTES:
                raise RecordError(name, f"{size} bytes are more than the {MOST_BYTES} allowed")
            return self._zip.read(name)
        # An encrypted member is a RuntimeError.
        except (OSError, RuntimeError, zipfile.BadZipFile, zlib.error, NotImplementedError, EOFError) as error:
            raise RecordError(name, f"cannot be read ({type(error).__name__}: {error})") from error

    def stamp(self, name: str) -> tuple[Any, ...]:
        """A value that changes when a picture is replaced."""
        if self._zip is not None:
            member = self._zip.getinfo(name)
            return name, member.file_size, member.CRC
        status = (self.place / name).stat()
        return name, status.st_size, status.st_mtime_ns


def _open_zip(place: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(place)
    except (OSError, zipfile.BadZipFile) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{place}: neither a folder nor a readable .zip of pictures ({reason})") from error


@dataclass(frozen=True, eq=False)
class PictureFiles:
    """Pictures of a folder as records, in place of shards; see `Records`.

    Attributes:
        source: the folder.
        names: path of each record's picture in it.
        infos: the JSON of each record; empty by default.
    """

    source: PictureFolder
    names: Sequence[str]
    infos: Sequence[Mapping[str, Any]] = ()
    damage: Sequence[Dropped] = field(default=(), init=False)

    def __len__(self) -> int:
        return len(self.names)

    @property
    def url(self) -> str:
        return str(self.source.place)

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(repr([self.source.stamp(name) for name in self.names]).encode()).hexdigest()

    @property
    def folder(self) -> Path | None:
        return self.source.place if self.source.place.is_dir() else self.source.place.parent

    def key(self, i: int) -> str:
        return self.names[i]

    def info(self, i: int) -> dict[str, Any]:
        return dict(self.infos[i]) if self.infos else {}

    def images(self, i: int) -> tuple[bytes, ...]:
        return (self.source.read(self.names[i]),)

    def image_count(self, i: int) -> int:
        return 1

    def detected(self, i: int) -> tuple[bytes, ...]:
        return ()
