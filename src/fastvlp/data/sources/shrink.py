"""Images made smaller before they are stored, where they are larger than any run will need."""

from __future__ import annotations

import io

from PIL import Image

from fastvlp.data.records.decode import ORIENTATION, orientation, read_pixels
from fastvlp.data.records.transform import Transform


def shrink(data: bytes, max_side: int) -> tuple[bytes, float]:
    """The image with its longer side at most `max_side` pixels, and the factor its sides were scaled by.

    An image that is small enough comes back as it is, any other as an RGB JPEG of quality 92. One that EXIF turns stays
    turned by it, so that boxes, which are in the stored pixels, need only be scaled. Raises what the decoders raise.
    """
    with Image.open(io.BytesIO(data)) as image:
        longest = max(image.size)
        turned = orientation(image)
    if longest <= max_side:
        return data, 1.0
    # As a letterbox needs it: at least `max_side` pixels on the longer side.
    pixels = Image.fromarray(read_pixels(data, Transform(size=max_side, mode="letterbox"), upright=False).numpy())
    scale = max_side / max(pixels.size)
    size = (max(2, round(pixels.width * scale)), max(2, round(pixels.height * scale)))
    exif = Image.Exif()
    exif[ORIENTATION] = turned
    file = io.BytesIO()
    pixels.resize(size, Image.Resampling.BICUBIC).save(file, "JPEG", quality=92, exif=exif if turned != 1 else b"")
    return file.getvalue(), max_side / longest
