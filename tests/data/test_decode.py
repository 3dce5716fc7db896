import io
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, features

from fastvlp.batch import Record
from fastvlp.data.records.decode import DecodeError, decode, open_image, read_pixels, stored_shape
from fastvlp.data.records.transform import Transform

SIZE = Transform(size=32, mode="squash")


def smooth(height: int = 96, width: int = 128, seed: int = 0) -> np.ndarray:
    small = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return np.array(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def encoded(image: Image.Image, format: str, **options) -> bytes:
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


def one(data: bytes, transform: Transform = SIZE, **options) -> torch.Tensor:
    return decode(Record(key="k", images=(data,), info={"a": 1}), transform, **options).images[0]


def reason(data: bytes, **options) -> str:
    with pytest.raises(DecodeError) as caught:
        one(data, **options)
    assert caught.value.key == "k"
    return caught.value.reason


def expected(pixels: np.ndarray) -> torch.Tensor:
    return SIZE(torch.from_numpy(pixels))


def gap(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.float() - b.float()).abs().mean())


def png_of(width: int, height: int, bits: int, colour: int, data: bytes) -> bytes:
    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF", "PPM", "WEBP"])
def test_lossless_formats_are_exact(format):
    options = {"lossless": True} if format == "WEBP" else {}
    assert torch.equal(one(encoded(Image.fromarray(smooth()), format, **options)), expected(smooth()))


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}])
def test_jpeg_is_close_and_decoded_at_reduced_scale(options):
    pixels = smooth(960, 1280)
    data = encoded(Image.fromarray(pixels), "JPEG", quality=95, **options)
    assert gap(one(data), expected(pixels)) < 2
    height, width, _ = read_pixels(data, SIZE).shape
    assert 32 <= height < 200
    assert width >= 32
    assert read_pixels(data).shape == (960, 1280, 3)
    # A letterbox needs its long side only.
    assert read_pixels(data, Transform(size=320, mode="letterbox")).shape == (240, 320, 3)


def test_grey_jpeg_becomes_rgb():
    grey = Image.fromarray(smooth()).convert("L")
    assert gap(one(encoded(grey, "JPEG", quality=95)), expected(np.array(grey.convert("RGB")))) < 2


def test_cmyk_jpeg_has_the_right_colours():
    image = Image.fromarray(smooth()).convert("CMYK")
    data = encoded(image, "JPEG", quality=95)
    assert gap(one(data), expected(np.array(image.convert("RGB")))) < 3
    assert gap(one(encoded(image, "TIFF")), expected(np.array(image.convert("RGB")))) == 0


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_exif_orientation_is_applied(orientation, format):
    undo = {
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }[orientation]
    upright = Image.fromarray(smooth(480, 640))
    stored = upright.transpose(undo) if undo is not None else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(stored, format, exif=exif, **({"quality": 95} if format == "JPEG" else {}))
    assert gap(one(data), expected(np.array(upright))) < 2


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_a_good_picture_with_broken_exif_is_used():
    for exif in (b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0II*\0\x08\0\0\0\xff\xff"):
        data = encoded(Image.fromarray(smooth()), "JPEG", exif=exif, quality=95)
        assert gap(one(data), expected(smooth())) < 2


def test_sixteen_bits_keep_the_upper_eight():
    values = smooth()[:, :, 0].astype(np.uint16) * 257
    grey = np.repeat((values >> 8).astype(np.uint8)[:, :, None], 3, axis=2)
    for format in ("PNG", "TIFF"):
        assert torch.equal(one(encoded(Image.fromarray(values), format)), expected(grey))
    colour = (smooth().astype(np.uint16) * 257).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in colour)
    assert torch.equal(one(png_of(128, 96, 16, 2, rows)), expected(smooth()))


def test_32_bit_and_float_images_are_refused_clearly():
    big = np.full((9, 9), 100_000, dtype=np.int32)
    assert "8 or 16 bits" in reason(encoded(Image.fromarray(big), "TIFF"))
    assert "8 or 16 bits" in reason(encoded(Image.fromarray(big.astype(np.float32)), "TIFF"))


def test_palettes_and_bilevel_images():
    image = Image.fromarray(smooth()).quantize(16)
    for format in ("PNG", "GIF"):
        assert torch.equal(one(encoded(image, format)), expected(np.array(image.convert("RGB"))))
    bilevel = Image.fromarray(smooth()).convert("1")
    assert torch.equal(one(encoded(bilevel, "PNG")), expected(np.array(bilevel.convert("RGB"))))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_laid_over_white(mode):
    rgba = Image.fromarray(smooth()).convert("RGBA")
    rgba.putalpha(Image.fromarray(np.repeat(np.uint8([[0] * 64 + [255] * 64]), 96, axis=0)))
    image = rgba.quantize(64) if mode == "P" else rgba.convert(mode)
    out = one(encoded(image, "PNG"))
    assert (out[:, :, :12] == 255).all()
    assert gap(out[:, :, 20:], expected(np.array(image.convert("RGB")))[:, :, 20:]) < 1


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG"])
def test_an_animation_gives_its_first_frame(format):
    frames = [Image.new("RGB", (40, 30), colour) for colour in ((250, 0, 0), (0, 250, 0), (0, 0, 250))]
    data = encoded(frames[0], format, save_all=True, append_images=frames[1:], duration=50)
    out = one(data).float().mean((1, 2))
    assert out[0] > 240
    assert out[1:].max() < 8


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"])
def test_truncated_images_are_refused(format):
    noise = np.random.default_rng(0).integers(0, 256, (96, 128, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(noise), format)
    for kept in (0.02, 0.5, 0.9):
        assert reason(data[: int(len(data) * kept)])


def test_truncated_jpeg_with_orientation_is_refused():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(Image.fromarray(smooth()), "JPEG", exif=exif)
    assert "truncated" in reason(data[: len(data) * 2 // 3])


@pytest.mark.parametrize("data", [b"", b"<html>404</html>", b"\xff\xd8\xff", b"%!PS-Adobe-3.0 EPSF-3.0\n", bytes(4096)])
def test_what_is_no_image_is_refused(data):
    assert "not an image of a known format" in reason(data) or "truncated" in reason(data)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_damaged_bytes_raise_nothing_but_decode_errors():
    rng = np.random.default_rng(0)
    for format in ("JPEG", "PNG", "WEBP", "GIF", "TIFF"):
        data = encoded(Image.fromarray(smooth(24, 24)), format)
        for _ in range(60):
            damaged = bytearray(data)
            for place in rng.integers(0, len(data), 4):
                damaged[place] = rng.integers(0, 256)
            try:
                assert one(bytes(damaged)).shape == (3, 32, 32)
            except DecodeError as error:
                assert error.reason


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_decompression_bombs_are_refused_before_they_are_decoded(monkeypatch):
    def decode_pixels(*args, **options):
        raise AssertionError("pixels were decoded")

    small = encoded(Image.fromarray(smooth()), "PNG")
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", decode_pixels)
    monkeypatch.setattr("simplejpeg.decode_jpeg", decode_pixels)
    assert "12000x12000 pixels are more than" in reason(png_of(12_000, 12_000, 8, 2, bytes(1000)))
    assert "exceeds limit" in reason(png_of(60_000, 60_000, 8, 2, bytes(1000)))
    jpeg = bytearray(encoded(Image.fromarray(smooth()), "JPEG"))
    frame = jpeg.index(b"\xff\xc0") + 5
    jpeg[frame : frame + 4] = struct.pack(">HH", 65_000, 65_000)
    assert "exceeds limit" in reason(bytes(jpeg))
    assert "more than the 5000 allowed" in reason(small, max_pixels=5000)
    assert "pixels were decoded" in reason(small)


def test_one_pixel_images_are_refused_unless_asked_for():
    dot = encoded(Image.new("RGB", (1, 1), (9, 8, 7)), "PNG")
    assert reason(dot) == "1x1 pixels, a side below 2"
    assert "a side below 2" in reason(encoded(Image.new("RGB", (500, 1)), "JPEG"))
    assert one(dot, min_side=1)[:, 5, 5].tolist() == [9, 8, 7]
    assert one(encoded(Image.new("RGB", (2, 3), (9, 8, 7)), "PNG"))[:, 31, 0].tolist() == [9, 8, 7]


def test_a_record_of_two_images_and_of_none():
    images = tuple(encoded(Image.fromarray(smooth(seed=s)), "PNG") for s in (1, 2))
    example = decode(Record(key="k", images=images, info={"a": 1}), SIZE)
    assert example.images.shape == (2, 3, 32, 32)
    assert torch.equal(example.images[1], expected(smooth(seed=2)))
    assert example.info == {"a": 1}
    with pytest.raises(DecodeError, match="k: image 1: not an image"):
        decode(Record(key="k", images=(images[0], b"x"), info={}), SIZE)
    with pytest.raises(DecodeError, match="k: no image"):
        decode(Record(key="k", images=(), info={}), SIZE)


def png_with(chunk: bytes, size: int) -> bytes:
    """A good PNG with a chunk that unpacks to `size` bytes, or is so long itself."""
    packed = zlib.compress(b"x" * size)
    body = {
        b"tEXt": b"k\0" + b"x" * size,
        b"zTXt": b"k\0\0" + packed,
        b"iTXt": b"k\0\1\0\0\0" + packed,
        b"iCCP": b"k\0\0" + packed,
    }[chunk]
    data = encoded(Image.fromarray(smooth()), "PNG")
    whole = struct.pack(">I", len(body)) + chunk + body + struct.pack(">I", zlib.crc32(chunk + body))
    return data[:33] + whole + data[33:]


@pytest.mark.slow
@pytest.mark.parametrize("size", [10, 2 << 20, 80 << 20])
@pytest.mark.parametrize("chunk", [b"tEXt", b"zTXt", b"iTXt", b"iCCP"])
def test_a_png_with_much_text_or_a_large_profile_is_read(chunk, size):
    data = png_with(chunk, size)
    assert torch.equal(one(data), expected(smooth()))
    assert stored_shape(data) == (96, 128, 1)


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_values_in_16_bits_are_scaled_by_the_bits_in_use(bits, format):
    grey = smooth()[:, :, 0].copy()
    grey[0, 0] = 255
    values = grey.astype(np.uint16) << (bits - 8)
    assert torch.equal(one(encoded(Image.fromarray(values), format)), expected(np.repeat(grey[:, :, None], 3, axis=2)))


def test_a_black_image_of_16_bits_stays_black():
    assert one(encoded(Image.fromarray(np.zeros((8, 8), np.uint16)), "PNG")).max() == 0


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow has no AVIF")
def test_avif():
    data = encoded(Image.fromarray(smooth()), "AVIF", quality=95)
    assert gap(one(data), expected(smooth())) < 3
    assert stored_shape(data)[:2] == (96, 128)


def test_heic_where_pillow_can():
    pytest.importorskip("pillow_heif").register_heif_opener()
    data = encoded(Image.fromarray(smooth()), "HEIF", quality=95)
    assert gap(one(data), expected(smooth())) < 3


def jpeg_of_scans(count, progressive=True):
    """A grey JPEG whose last scan is there `count` times more."""
    data = encoded(Image.new("RGB", (64, 64), (90, 90, 90)), "JPEG", progressive=progressive)
    last = data.rindex(b"\xff\xda")
    return data[:-2] + data[last:-2] * count + b"\xff\xd9"


def test_a_jpeg_of_hundreds_of_scans_is_refused_before_it_is_decoded(monkeypatch):
    """A few bytes of a progressive JPEG are another pass over all its pixels."""
    assert one(jpeg_of_scans(8)).shape == (3, 32, 32)
    monkeypatch.setattr("simplejpeg.decode_jpeg", lambda *_, **__: pytest.fail("decoded"))
    for data in (jpeg_of_scans(300), jpeg_of_scans(60)):
        assert "scans, more than 50" in reason(data)
        with pytest.raises(ValueError, match="scans"):
            open_image(data)


def test_scans_are_counted_of_a_jpeg_that_is_not_progressive():
    data = jpeg_of_scans(60, progressive=False)
    first = data.index(b"\xff\xda")
    one_component = data[: first + 2] + b"\x00\x08\x01\x01\x00\x00\x3f\x00" + data[first + 14 :]
    assert "scans, more than 50" in reason(one_component)


def test_a_tiff_of_a_huge_tile_is_refused():
    """16 pixels a side, in a tile of 40,000: libtiff would take 1.6 GB."""
    packed = zlib.compress(bytes(1000))
    tags = [(256, 16), (257, 16), (258, 8), (259, 8), (262, 1), (277, 1), (322, 40_000), (323, 40_000), (324, 8)]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in [*tags, (325, len(packed))])
    data = b"II*\0" + struct.pack("<I", 8 + len(packed)) + packed + struct.pack("<H", 10) + entries + bytes(4)
    assert "tiles of 40000x40000" in reason(data)


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
@pytest.mark.parametrize("alpha", [False, True])
def test_colours_in_16_bits_are_scaled_by_the_bits_in_use(bits, alpha):
    colours = smooth().copy()
    colours[0, 0] = 255
    values = colours.astype(np.uint16) << (bits - 8)
    if alpha:
        values = np.concatenate([values, np.full_like(values[:, :, :1], 0xFFFF)], 2)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    assert torch.equal(one(png_of(128, 96, 16, 6 if alpha else 2, rows)), expected(colours))


@pytest.mark.parametrize("bits", [12, 16])
def test_a_large_picture_of_16_bits_takes_no_more_memory_than_its_pixels_twice(bits):
    small = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    colours = small.repeat(100, 0).repeat(100, 1)
    values = colours.astype(np.uint16) << (bits - 8)
    data = png_of(800, 800, 16, 2, b"".join(b"\0" + row.astype(">u2").tobytes() for row in values))
    # Beside the memory that Pillow takes for the upper and the lower halves.
    tracemalloc.start()
    try:
        pixels = read_pixels(data)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert torch.equal(pixels, torch.from_numpy(colours))
    assert peak < 2.2 * colours.nbytes + len(data)
