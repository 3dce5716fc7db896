"""Encoded images to pixels. An image that cannot be read raises a DecodeError with its record and the reason; it is never
replaced by another."""

from __future__ import annotations

import io
from typing import NamedTuple

import numpy as np
import simplejpeg
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from fastvlp.batch import Example, Record
from fastvlp.data.records.shards import RecordError
from fastvlp.data.records.transform import Transform

# 268 MB as RGB. Pillow warns from the same size on, and refuses at twice that whatever `max_pixels` says.
MAX_PIXELS = 89_478_485

# Only formats that are decoded in the process: Pillow hands some others (EPS) to a program that executes them.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
ORIENTATION = 0x0112


class StoredShape(NamedTuple):
    """Size of a stored image, whose pixels a record's boxes are in, and its EXIF orientation (1: it is upright)."""

    height: int
    width: int
    orientation: int


class DecodeError(RecordError):
    """An image of the record cannot be read."""


def decode(record: Record, transform: Transform, *, max_pixels: int = MAX_PIXELS, min_side: int = 2) -> Example:
    """Decodes every image of the record: uint8 [I 3 size size].

    EXIF's orientation is applied, transparency is laid over white, 16 bits are cut to the upper 8, CMYK and palettes are
    converted, and of an animation the first frame is taken. Boxes in `info` stay in the stored image's pixels.

    Raises DecodeError for damaged images, for more than `max_pixels` (read from the header, before anything is
    decoded) and for a side below `min_side`.
    """
    if not record.images:
        raise DecodeError(record.key, "no image")
    images = []
    for i, data in enumerate(record.images):
        try:
            images.append(transform(read_pixels(data, transform, max_pixels=max_pixels, min_side=min_side)))
        # Decoders given hostile bytes raise anything from struct.error to RecursionError; MemoryError is one of them.
        except Exception as error:
            which = f"image {i}: " if len(record.images) > 1 else ""
            raise DecodeError(record.key, f"{which}{_reason(error)}") from error
    return Example(key=record.key, images=torch.stack(images), info=record.info)


def read_pixels(
    data: bytes,
    transform: Transform | None = None,
    *,
    max_pixels: int = MAX_PIXELS,
    min_side: int = 2,
    upright: bool = True,
) -> Tensor:
    """The pixels of an encoded image, uint8 [H W 3], writable.

    Args:
        transform: where it is given, a JPEG is decoded at the smallest scale that is enough for it.
        upright: apply EXIF's orientation.

    Raises what the decoders raise; ValueError for an image that is too large or too small.
    """
    image = Image.open(io.BytesIO(data), formats=_FORMATS)
    width, height = image.size
    if width * height > max_pixels:
        raise ValueError(f"{width}x{height} pixels are more than the {max_pixels} allowed; scale it down")
    if min(width, height) < min_side:
        raise ValueError(f"{width}x{height} pixels, a side below {min_side}")
    least = transform.least(height, width) if transform else (0, 0)
    jpeg = image.format in ("JPEG", "MPO")
    turned = upright and orientation(image) != 1
    if jpeg and image.mode in ("RGB", "L") and not turned:
        try:
            # Scales between 1 and 1/2 have no fast inverse DCT.
            pixels = simplejpeg.decode_jpeg(data, "RGB", min_height=least[0], min_width=least[1], min_factor=2)
            return torch.from_numpy(pixels)
        except ValueError:
            pass  # also raised for harmless oddities that Pillow reads
    if jpeg and transform:
        image.draft(None, (least[1], least[0]))
    return opened_pixels(image, upright=upright)


def opened_pixels(image: Image.Image, *, upright: bool = True) -> Tensor:
    """The pixels of an image that Pillow has opened or made, as of `read_pixels`."""
    turned = upright and orientation(image) != 1
    return torch.from_numpy(np.array(_rgb(ImageOps.exif_transpose(image) if turned else image)))


def stored_shape(data: bytes) -> StoredShape:
    """Reads the header of an image that can be decoded."""
    with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
        return StoredShape(image.height, image.width, orientation(image))


def orientation(image: Image.Image) -> int:
    """EXIF's orientation, 1 to 8; 1 is upright."""
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except Exception:  # a good picture with broken EXIF is common on the web
        return 1


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 0xFFFF:
            raise ValueError("32-bit pixels; store the image with 8 or 16 bits a channel")
        return Image.fromarray((values >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("floating-point pixels; store the image with 8 or 16 bits a channel")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return f"not an image of a known format ({', '.join(_FORMATS)})"
    if isinstance(error, (ValueError, Image.DecompressionBombError)):
        return str(error)
    return f"damaged or truncated image ({type(error).__name__}: {error})"
