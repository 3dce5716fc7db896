"""Small pictures for the page: made from an encoded picture, or from the pictures in shards."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image

from fastvlp.data.records.decode import MAX_PIXELS, read_pixels
from fastvlp.data.records.shards import Shards
from fastvlp.data.records.transform import Transform
from fastvlp.errors import UserError
from fastvlp.search.pictures import PictureStore

SIDE = 320


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

    def has(self, id: str) -> bool:
        """Whether the shards list a picture. It is not read, so `get` may still return None, if the shards have changed."""
        return id in self._positions

    def put(self, id: str, data: bytes) -> None:
        raise UserError("pictures of shards are not changed; to add some, make an index with `vlp index build`")

    def delete(self, id: str) -> None:
        raise UserError("pictures of shards are not changed; to delete some, make an index with `vlp index build`")


def shard_pictures(data: str | Path) -> ShardPictures | None:
    """Returns the pictures of a folder of shards; None if it is gone or cannot be reached."""
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
