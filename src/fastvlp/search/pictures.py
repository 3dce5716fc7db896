"""Small pictures of an index's items, for the page to show and for re-ranking: a file each, or made from the shards."""

from __future__ import annotations

import hashlib
import io
from abc import ABC, abstractmethod
from pathlib import Path

from PIL import Image

from fastvlp.data.records.decode import MAX_PIXELS, read_pixels
from fastvlp.data.records.shards import Shards
from fastvlp.data.records.transform import Transform
from fastvlp.errors import UserError
from fastvlp.files import write_whole
from fastvlp.search.checks import EngineError

SIDE = 320


class PictureStore(ABC):
    """Small pictures by the ids of an index's items. Several threads may use it."""

    @abstractmethod
    def get(self, id: str) -> bytes | None:
        """Returns an encoded picture; None where there is none."""

    @abstractmethod
    def put(self, id: str, data: bytes) -> None:
        """Stores an encoded picture. Raises UserError where pictures cannot be stored, EngineError where the disk is full."""

    @abstractmethod
    def delete(self, id: str) -> None:
        """Deletes a picture, if there is one. Raises UserError where pictures cannot be deleted."""


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

    def put(self, id: str, data: bytes) -> None:
        try:
            write_whole(self._path(id), data)
        except (UserError, OSError) as error:
            raise EngineError(str(error)) from error

    def delete(self, id: str) -> None:
        self._path(id).unlink(missing_ok=True)


class ShardPictures(PictureStore):
    """Pictures read from shards when they are needed, and stored nowhere."""

    def __init__(self, shards: Shards):
        self.shards = shards
        self._positions = {key: position for position, key in enumerate(shards.keys)}

    def get(self, id: str) -> bytes | None:
        if (position := self._positions.get(id)) is None:
            return None
        try:
            return thumbnail(self.shards.read(position).images[0])
        # The shards may have changed since; and decoders raise anything for damaged bytes.
        except Exception:
            return None

    def put(self, id: str, data: bytes) -> None:
        raise UserError("pictures of shards are not changed; to add some, make an index with `vlp index build`")

    def delete(self, id: str) -> None:
        raise UserError("pictures of shards are not changed; to delete some, make an index with `vlp index build`")


def shard_pictures(data: str | Path) -> ShardPictures | None:
    """Returns the pictures of a folder of shards; None where it is gone or cannot be reached."""
    try:
        return ShardPictures(Shards(data))
    except (UserError, OSError, ImportError):
        return None


def thumbnail(data: bytes, side: int = SIDE, max_pixels: int = MAX_PIXELS) -> bytes:
    """Returns an upright picture whose longest side is at most `side` pixels, as WebP, which is small for drawings and for
    photographs.

    Args:
        data: An encoded picture.
        side: In pixels.
        max_pixels: A picture with more is refused with ValueError before it is decoded.

    Raises:
        Exception: Whatever a decoder raises for damaged bytes.
    """
    pixels = read_pixels(data, Transform(size=side, mode="letterbox"), max_pixels=max_pixels)
    image = Image.fromarray(pixels.numpy())
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, "WEBP", quality=85)
    return file.getvalue()
