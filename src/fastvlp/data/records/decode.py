"""Decodes images to pixels. An image that cannot be read raises a DecodeError with its record and the reason; it is never
replaced by another one."""

from __future__ import annotations

import io
from contextlib import suppress
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import simplejpeg
import torch
from PIL import Image, ImageOps, UnidentifiedImageError, features
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from torch import Tensor

from fastvlp.batch import Example, Record
from fastvlp.data.records.plain_jpeg import plain_size
from fastvlp.data.records.shards import RecordError
from fastvlp.data.records.transform import Transform

# 268 MB as RGB. Pillow warns from the same size on, and refuses at twice that whatever `max_pixels` says.
MAX_PIXELS = 89_478_485

# Only formats that are decoded in the process: Pillow hands some others (EPS) to a program that executes them.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
# Chunks of a PNG that contain no pixels and may be megabytes; Pillow would refuse a picture because of their size.
_PNG_TEXTS = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")
ORIENTATION = 0x0112


# Largest number of scans of a JPEG. Encoders write about ten. Decoding a scan costs a pass over the whole image, even if it has
# only a few bytes.
MAX_SCANS = 50
# Number of rows of a 16-bit PNG that are joined at a time.
_STRIP = 64
# Largest side of a tile of a TIFF, which is decoded as a whole.
TILE = (322, 323)


class StoredShape(NamedTuple):
    """Size of a stored image, to whose pixels a record's boxes refer, and its EXIF orientation (1: it is upright)."""

    height: int
    width: int
    orientation: int


class DecodeError(RecordError):
    """An image of the record cannot be read."""


def decode(record: Record, transform: Transform, *, max_pixels: int = MAX_PIXELS, min_side: int = 2) -> Example:
    """Decodes every image of the record: uint8 [I 3 size size].

    EXIF's orientation is applied, and transparent images get a white background. Images of 16 bits keep the upper 8 bits that
    they use, CMYK and palettes are converted, and the first frame of an animation is used. Boxes in `info` still refer to the
    stored image's pixels.

    Raises DecodeError for damaged images, for more than `max_pixels` (read from the header, before anything is
    decoded) and for a side below `min_side`.
    """
    images = decoded_images(record, transform, max_pixels=max_pixels, min_side=min_side)
    return Example(key=record.key, images=torch.stack(images), info=record.info)


def decoded_images(
    record: Record, transform: Transform, *, max_pixels: int = MAX_PIXELS, min_side: int = 2
) -> list[Tensor]:
    """The images of `decode`, uint8 [3 size size] each."""
    return [image for image, _ in decoded_with_shapes(record, transform, max_pixels=max_pixels, min_side=min_side)]


def decoded_with_shapes(
    record: Record, transform: Transform, *, max_pixels: int = MAX_PIXELS, min_side: int = 2
) -> list[tuple[Tensor, StoredShape]]:
    """Returns the images of `decode`, uint8 [3 size size] each, and how each is stored."""
    if not record.images:
        raise DecodeError(record.key, "no image")
    images = []
    for i, data in enumerate(record.images):
        try:
            pixels, shape = _pixels_and_shape(data, transform, max_pixels, min_side)
            images.append((transform(pixels), shape))
        # With hostile bytes, decoders raise many types of exceptions, from struct.error to RecursionError and MemoryError.
        except Exception as error:
            which = f"image {i}: " if len(record.images) > 1 else ""
            raise DecodeError(record.key, f"{which}{_reason(error)}") from error
    return images


def read_pixels(
    data: bytes,
    transform: Transform | None = None,
    *,
    max_pixels: int = MAX_PIXELS,
    min_side: int = 2,
    upright: bool = True,
) -> Tensor:
    """Returns the pixels of an encoded image, uint8 [H W 3], writable.

    Args:
        transform: if it is given, a JPEG is decoded at the smallest scale that is enough for it.
        upright: apply EXIF's orientation.

    Raises the exceptions of the decoders; ValueError for an image that is too large or too small.
    """
    return _pixels_and_shape(data, transform, max_pixels, min_side, upright)[0]


def _pixels_and_shape(
    data: bytes, transform: Transform | None, max_pixels: int, min_side: int, upright: bool = True
) -> tuple[Tensor, StoredShape]:
    """Returns the pixels and the result of `stored_shape`; the header of an image is read once."""
    plain = plain_size(data)
    if plain is not None and plain[0] * plain[1] <= MAX_PIXELS:
        _check_size(*plain, max_pixels, min_side)
        with suppress(ValueError):  # also raised for harmless oddities that Pillow reads
            return _fast_pixels(data, *plain, transform), StoredShape(*plain, 1)
    image = open_image(data)
    _check_size(image.height, image.width, max_pixels, min_side)
    jpeg = image.format in ("JPEG", "MPO")
    shape = StoredShape(image.height, image.width, orientation(image))
    turned = upright and shape.orientation != 1
    if jpeg and image.mode in ("RGB", "L") and not turned:
        with suppress(ValueError):
            return _fast_pixels(data, image.height, image.width, transform), shape
    if jpeg and transform:
        height, width = transform.least(image.height, image.width)
        image.draft(None, (width, height))
    return opened_pixels(_in_8_bits(image, data), upright=upright), shape


def _check_size(height: int, width: int, max_pixels: int, min_side: int) -> None:
    if width * height > max_pixels:
        raise ValueError(f"{width}x{height} pixels are more than the {max_pixels} allowed; scale it down")
    if min(width, height) < min_side:
        raise ValueError(f"{width}x{height} pixels, a side below {min_side}")


def _fast_pixels(data: bytes, height: int, width: int, transform: Transform | None) -> Tensor:
    """Returns the pixels of an upright JPEG, grey or with three colours. Raises ValueError for a JPEG that the decoder cannot
    read."""
    least = transform.least(height, width) if transform else (0, 0)
    # Scales between 1 and 1/2 have no fast inverse DCT.
    return torch.from_numpy(simplejpeg.decode_jpeg(data, "RGB", min_height=least[0], min_width=least[1], min_factor=2))


def open_image(data: bytes) -> Image.Image:
    """Opens the image with Pillow, without reading its pixels. The texts and the colour profile of a PNG, which may have any
    size, are left out. Raises the exceptions of the decoders; ValueError for an image that costs far more than its pixels."""
    data = _without_texts(data)
    image = Image.open(io.BytesIO(data), formats=_all_formats())
    _check_cost(image, data)
    return image


def _check_cost(image: Image.Image, data: bytes) -> None:
    if isinstance(image, JpegImageFile) and image.fp is not None:
        # Pillow has read up to the end of the first scan's header: marker, length, number of components, two bytes for each
        # component, and three bytes.
        head = b"\xff\xda\x00" + bytes([6 + 2 * image.layers, image.layers])
        first = image.fp.tell() - 3 - 2 * image.layers
        # If a scan is not progressive and has all components, it is the only one.
        if image.info.get("progressive") or image.format == "MPO" or data[first - len(head) : first] != head:
            scans = data.count(b"\xff\xda")
            if scans > MAX_SCANS:
                raise ValueError(f"a JPEG of {scans} scans, more than {MAX_SCANS}; save it again")
    elif isinstance(image, TiffImageFile):
        across, down = (int(image.tag_v2.get(tag, 0)) for tag in TILE)
        if across * down > MAX_PIXELS:
            raise ValueError(f"tiles of {across}x{down} pixels are more than the {MAX_PIXELS} allowed; save it again")


@lru_cache
def _all_formats() -> tuple[str, ...]:
    """Returns the formats that are decoded. AVIF is one of them if Pillow can decode it, and HEIC if the package `pillow-heif`
    is installed."""
    more = []
    if features.check("avif"):
        more.append("AVIF")
    with suppress(ImportError):
        import pillow_heif

        pillow_heif.register_heif_opener()
        more.append("HEIF")
    return (*_FORMATS, *more)


def _without_texts(data: bytes) -> bytes:
    if not data.startswith(b"\x89PNG\r\n\x1a\n") or not any(name in data for name in _PNG_TEXTS):
        return data
    view, parts, at = memoryview(data), [data[:8]], 8
    while at + 12 <= len(data):
        end = at + 12 + int.from_bytes(view[at : at + 4])
        if bytes(view[at + 4 : at + 8]) not in _PNG_TEXTS:
            parts.append(bytes(view[at:end]))
        at = end
    # The bytes after the last complete chunk of a file that was cut off.
    return b"".join([*parts, data[at:]])


def opened_pixels(image: Image.Image, *, upright: bool = True) -> Tensor:
    """Returns the pixels of an image that Pillow has opened or made, like `read_pixels`."""
    turned = upright and orientation(image) != 1
    return torch.from_numpy(np.array(_rgb(ImageOps.exif_transpose(image) if turned else image)))


def stored_shape(data: bytes) -> StoredShape:
    """Reads the header of an image that can be decoded."""
    plain = plain_size(data)
    if plain is not None:
        return StoredShape(*plain, 1)
    with open_image(data) as image:
        return StoredShape(image.height, image.width, orientation(image))


def orientation(image: Image.Image) -> int:
    """Returns EXIF's orientation, 1 to 8; 1 is upright."""
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except Exception:  # a good picture with broken EXIF is common on the web
        return 1


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 0xFFFF:
            raise ValueError("32-bit pixels; store the image with 8 or 16 bits a channel")
        shift = _bits(int(values.max())) - 8
        return Image.fromarray((values >> shift).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("floating-point pixels; store the image with 8 or 16 bits a channel")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _in_8_bits(image: Image.Image, data: bytes) -> Image.Image:
    """Converts a PNG with 16 bits per channel to 8 bits; returns any other image unchanged. Pillow alone would keep the upper 8
    bits, even if only the lower 12 are used. It can return the upper halves of the numbers, and the lower halves, which are
    needed only if the upper ones are nearly empty. They are joined in strips, so that no complete image of 16 bits is made."""
    if image.format != "PNG" or data[24:25] != b"\x10":
        return image
    lower = open_image(data)
    if not isinstance(lower, PngImageFile) or lower.tile[0].args not in ("RGB;16B", "RGBA;16B"):
        return image
    highest = max(most for _, most in image.getextrema()[:3])  # type: ignore[misc]
    # The colour that is transparent has 16 bits.
    image.info.pop("transparency", None)
    if _bits(highest << 8) == 16:
        return image
    lower.tile = [lower.tile[0]._replace(args=f"{lower.mode};16L")]
    strips = [(0, y, image.width, min(y + _STRIP, image.height)) for y in range(0, image.height, _STRIP)]
    highest = max(int(_joined(image, lower, strip)[..., :3].max()) for strip in strips)
    shift = np.full(len(image.getbands()), _bits(highest) - 8, dtype=np.uint16)
    shift[3:] = 8  # of transparency, which is never scaled
    for strip in strips:
        image.paste(Image.fromarray((_joined(image, lower, strip) >> shift).astype(np.uint8)), strip)
    return image


def _joined(upper: Image.Image, lower: Image.Image, strip: tuple[int, int, int, int]) -> np.ndarray:
    """Returns the 16-bit numbers of some rows, uint16 [rows width channels]."""
    return np.asarray(upper.crop(strip)).astype(np.uint16) << 8 | np.asarray(lower.crop(strip))


def _bits(highest: int) -> int:
    """Returns the number of bits that a 16-bit image uses. A scanner or camera with 10, 12 or 14 bits writes its values
    unscaled, so the image would be nearly black."""
    return next(bits for bits in (8, 10, 12, 14, 16) if highest < 1 << bits)


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return f"not an image of a known format ({', '.join(_all_formats())})"
    if isinstance(error, (ValueError, Image.DecompressionBombError)):
        return str(error)
    return f"damaged or truncated image ({type(error).__name__}: {error})"
