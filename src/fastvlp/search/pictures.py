"""Small pictures of an index's items, for the page to show and for re-ranking: a file each, or made from the shards."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import NoReturn, TypeAlias

from PIL import Image

from fastvlp.data.records.decode import MAX_PIXELS, read_pixels
from fastvlp.data.records.shards import Shards
from fastvlp.data.records.transform import Transform
from fastvlp.errors import UserError
from fastvlp.files import write_whole
from fastvlp.search.bulk import open_embedded
from fastvlp.search.engines.codes import FIXED
from fastvlp.search.index import EngineError

SIDE = 320


class Pictures:
    """The name of a file is a hash of the item's id, so that an id can be anything."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)

    def _path(self, id: str) -> Path:
        name = hashlib.sha256(id.encode()).hexdigest()
        return self.folder / name[:2] / name[2:34]

    def put(self, id: str, data: bytes) -> None:
        """Raises EngineError where the disk is full or the folder not writable."""
        try:
            write_whole(self._path(id), data)
        except (UserError, OSError) as error:
            raise EngineError(str(error)) from error

    def get(self, id: str) -> bytes | None:
        try:
            return self._path(id).read_bytes()
        except FileNotFoundError:
            return None

    def delete(self, id: str) -> None:
        self._path(id).unlink(missing_ok=True)


class ShardPictures:
    """Of what `vlp embed` wrote: read from the shards when they are asked for, and kept nowhere. Safe to ask from several
    threads."""

    def __init__(self, shards: Shards):
        self.shards = shards
        self._places = {key: place for place, key in enumerate(shards.keys)}

    def put(self, id: str, data: bytes) -> NoReturn:
        raise UserError(FIXED)

    def get(self, id: str) -> bytes | None:
        if (place := self._places.get(id)) is None:
            return None
        try:
            return thumbnail(self.shards.read(place).images[0])
        # The shards may have changed since; and decoders given damaged bytes raise anything.
        except Exception:
            return None

    def delete(self, id: str) -> NoReturn:
        raise UserError(FIXED)


Kept: TypeAlias = Pictures | ShardPictures


def shard_pictures(embedded: Path) -> ShardPictures | None:
    """None where the shards are gone or cannot be reached. Raises UserError for a folder that `vlp embed` did not write."""
    data = open_embedded(embedded).data
    try:
        return ShardPictures(Shards(data))
    except (UserError, OSError, ImportError):
        return None


def thumbnail(data: bytes, side: int = SIDE, max_pixels: int = MAX_PIXELS) -> bytes:
    """The upright picture with a longest side of at most `side`; WebP, which keeps few colours and photographs alike small.
    Raises what decoders raise, ValueError for a picture that is too large."""
    pixels = read_pixels(data, Transform(size=side, mode="letterbox"), max_pixels=max_pixels)
    image = Image.fromarray(pixels.numpy())
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, "WEBP", quality=85)
    return file.getvalue()
