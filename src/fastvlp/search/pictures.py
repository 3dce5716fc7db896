"""Small pictures of an index's items, for the page to show and for re-ranking."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from pathlib import Path

from fastvlp.errors import UserError
from fastvlp.files import write_whole
from fastvlp.search.checks import EngineError


class PictureStore(ABC):
    """Small pictures by the ids of an index's items. Several threads may use it."""

    @abstractmethod
    def get(self, id: str) -> bytes | None:
        """Returns an encoded picture; None if there is none."""

    def has(self, id: str) -> bool:
        """Whether there is a picture. By default reads it."""
        return self.get(id) is not None

    @abstractmethod
    def put(self, id: str, data: bytes) -> None:
        """Stores an encoded picture. Raises UserError if pictures cannot be stored, EngineError if the disk is full."""

    @abstractmethod
    def delete(self, id: str) -> None:
        """Deletes a picture, if there is one. Raises UserError if pictures cannot be deleted."""


class PictureFolder(PictureStore):
    """Pictures in files. A file is named by a hash of the item's id, so that an id can be anything."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)

    def _path(self, id: str) -> Path:
        name = hashlib.sha256(id.encode()).hexdigest()
        return self.folder / name[:2] / name[2:34]

    def get(self, id: str) -> bytes | None:
        try:
            return self._path(id).read_bytes()
        except FileNotFoundError:
            return None

    def has(self, id: str) -> bool:
        return self._path(id).is_file()

    def put(self, id: str, data: bytes) -> None:
        try:
            write_whole(self._path(id), data)
        except (UserError, OSError) as error:
            raise EngineError(str(error)) from error

    def delete(self, id: str) -> None:
        self._path(id).unlink(missing_ok=True)
