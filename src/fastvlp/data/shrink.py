"""Encoded images checked once, before they are stored, and made smaller where they are larger than a run needs."""

from __future__ import annotations

import io
import struct
import warnings

from PIL import Image, ImageOps

MAX_PIXELS = 1 << 27  # 128 megapixels; a bomb of a few kilobytes decodes to many gigabytes


def checked(data: bytes, max_side: int = 0) -> tuple[bytes, float]:
    """The image as it shall be stored and the factor its sides were scaled by.

    Decodes the whole file; with `max_side` an image whose longer side has more pixels comes back as a JPEG of quality
    92 with that side. Raises ValueError saying what is wrong with it.
    """
    try:
        with warnings.catch_warnings(), Image.open(io.BytesIO(data)) as image:
            warnings.simplefilter("ignore")
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise ValueError(f"image has too many pixels ({width}x{height})")
            longest = max(width, height)
            if not max_side or longest <= max_side:
                image.draft(None, (1, 1))  # a JPEG at an eighth of its sides: every byte is read, few are transformed
                image.load()
                return data, 1.0
            scale = max_side / longest
            size = (max(1, round(width * scale)), max(1, round(height * scale)))
            image.draft("RGB", (2 * size[0], 2 * size[1]))
            return _jpeg(image, size), scale
    except Image.DecompressionBombError:
        raise ValueError("image has too many pixels") from None
    except (OSError, SyntaxError, EOFError, struct.error, TypeError, IndexError) as error:
        raise ValueError(f"image cannot be decoded ({_brief(error)})") from None


def _jpeg(image: Image.Image, size: tuple[int, int]) -> bytes:
    upright = ImageOps.exif_transpose(image)
    if upright.size != image.size:
        size = (size[1], size[0])
    file = io.BytesIO()
    upright.convert("RGB").resize(size, Image.Resampling.BICUBIC).save(file, "JPEG", quality=92)
    return file.getvalue()


def _brief(error: Exception) -> str:
    """Without the addresses of objects, so that equal faults are counted together."""
    return "unknown format" if "cannot identify image" in str(error) else str(error)
