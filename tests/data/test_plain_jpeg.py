"""The heads of JPEGs that are read without Pillow say what Pillow says."""

import io
from contextlib import suppress

import numpy as np
import pytest
import torch
from PIL import Image

from fastvlp.data.records import decode
from fastvlp.data.records.decode import open_image, orientation, read_pixels, stored_shape
from fastvlp.data.records.plain_jpeg import plain_size
from fastvlp.data.records.transform import Transform


def jpeg(mode="RGB", **options) -> bytes:
    small = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(small).resize((90, 60), Image.Resampling.BICUBIC).convert(mode).save(out, "JPEG", **options)
    return out.getvalue()


PLAIN = [
    ("RGB", {}),
    ("L", {}),
    ("RGB", {"quality": 95, "subsampling": 0}),
    ("RGB", {"comment": b"a note", "restart_marker_rows": 1}),
    ("RGB", {"optimize": True, "dpi": (72, 72)}),
]
OTHERS = [
    ("CMYK", {}),
    ("RGB", {"progressive": True}),
    ("RGB", {"exif": b"Exif\0\0II*\0\x08\0\0\0\0\0\0\0\0\0"}),
    ("RGB", {"xmp": b'<rdf:Description tiff:Orientation="6"/>'}),
    ("RGB", {"icc_profile": b"p" * 300}),
    ("RGB", {"keep_rgb": True}),
]


@pytest.mark.parametrize(("mode", "options"), PLAIN)
def test_the_size_of_a_plain_picture(mode, options):
    assert plain_size(jpeg(mode, **options)) == (60, 90)


@pytest.mark.parametrize(("mode", "options"), OTHERS)
def test_any_other_is_left_to_pillow(mode, options):
    assert plain_size(jpeg(mode, **options)) is None


@pytest.mark.parametrize(
    "data", [b"", b"\xff\xd8", b"\xff\xd8\xff", b"\xff\xd8\xff\xe0", b"\x89PNG\r\n\x1a\n" + bytes(90)]
)
def test_what_is_no_jpeg(data):
    assert plain_size(data) is None


def test_two_pictures_in_a_file_are_left_to_pillow():
    out = io.BytesIO()
    Image.new("RGB", (40, 30)).save(out, "MPO", save_all=True, append_images=[Image.new("RGB", (40, 30))])
    assert plain_size(out.getvalue()) is None


@pytest.mark.parametrize(("mode", "options"), PLAIN + OTHERS)
@pytest.mark.parametrize("transform", [None, Transform(size=24), Transform(size=24, mode="letterbox")])
def test_pixels_and_shape_are_the_same_as_with_pillow(monkeypatch, mode, options, transform):
    data = jpeg(mode, **options)
    here = read_pixels(data, transform), stored_shape(data)
    monkeypatch.setattr(decode, "plain_size", lambda _: None)
    assert torch.equal(here[0], read_pixels(data, transform))
    assert here[1] == stored_shape(data)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")
def test_a_damaged_head_says_what_pillow_says_or_nothing():
    rng, agreed = np.random.default_rng(0), 0
    for mode, options in PLAIN + OTHERS:
        data = jpeg(mode, **options)
        head = data.index(b"\xff\xda") + 14
        for _ in range(300):
            damaged = bytearray(data)
            for place in rng.integers(0, head, 2):
                damaged[place] = rng.integers(0, 256)
            size = plain_size(bytes(damaged))
            # What Pillow cannot open, the decoder of the pixels refuses too.
            with suppress(Exception):
                image = open_image(bytes(damaged))
                if size is not None:
                    assert (image.format, image.mode in ("RGB", "L"), orientation(image)) == ("JPEG", True, 1)
                    assert size == (image.height, image.width)
                    agreed += 1
    assert agreed > 100
