import numpy as np
import pytest
import torch
from PIL import Image

from fastvlp.data.records.transform import Transform
from fastvlp.errors import UserError


def smooth(height: int, width: int) -> np.ndarray:
    small = np.random.default_rng(0).integers(0, 256, (8, 10, 3), dtype=np.uint8)
    return np.array(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def difference(a: torch.Tensor, b: Image.Image) -> np.ndarray:
    return np.abs(a.permute(1, 2, 0).numpy().astype(int) - np.asarray(b).astype(int))


@pytest.mark.parametrize(("height", "width"), [(60, 90), (90, 60), (300, 310), (24, 24), (8, 9)])
def test_each_mode_agrees_with_pillow(height, width):
    pixels = smooth(height, width)
    image = Image.fromarray(pixels)
    bicubic = Image.Resampling.BICUBIC

    squashed = Transform(size=24, mode="squash")(torch.from_numpy(pixels))
    assert difference(squashed, image.resize((24, 24), bicubic)).max() <= 2

    # Both crops resize the short side first, as torchvision and transformers do.
    for mode, short in (("crop", 24), ("centre", 27)):
        w, h = int(width * short / min(height, width)), int(height * short / min(height, width))
        left, top = (w - 24) // 2, (h - 24) // 2
        middle = image.resize((w, h), bicubic).crop((left, top, left + 24, top + 24))
        assert difference(Transform(size=24, mode=mode)(torch.from_numpy(pixels)), middle).max() <= 2

    w, h = round(width * 24 / max(height, width)), round(height * 24 / max(height, width))
    boxed = Transform(size=24, mode="letterbox", fill=7)(torch.from_numpy(pixels))
    left, top = (24 - w) // 2, (24 - h) // 2
    expected = Image.new("RGB", (24, 24), (7, 7, 7))
    expected.paste(image.resize((w, h), bicubic), (left, top))
    assert difference(boxed, expected).max() <= 2


@pytest.mark.parametrize("mode", ["crop", "centre", "squash", "letterbox"])
@pytest.mark.parametrize(("height", "width"), [(1, 1), (2, 2), (1, 7), (2, 50_000), (50_000, 2), (24, 24)])
def test_any_size_becomes_the_square(mode, height, width):
    pixels = torch.full((height, width, 3), 200, dtype=torch.uint8)
    out = Transform(size=24, mode=mode, fill=200)(pixels)
    assert out.shape == (3, 24, 24)
    assert out.dtype == torch.uint8
    assert out.is_contiguous()
    assert (out == 200).all()


def test_the_result_does_not_share_memory_with_the_pixels():
    pixels = torch.zeros(24, 24, 3, dtype=torch.uint8)
    out = Transform(size=24)(pixels)
    pixels.fill_(9)
    assert (out == 0).all()


def test_bad_settings_are_refused():
    with pytest.raises(UserError, match=r"crop.*centre.*squash.*letterbox"):
        Transform(size=24, mode="stretch")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="`size` 0"):
        Transform(size=0)


@pytest.mark.parametrize("mode", ["crop", "centre", "squash", "letterbox"])
@pytest.mark.parametrize(("height", "width"), [(60, 90), (90, 60), (47, 48), (300, 31), (24, 24)])
def test_boxes_move_as_their_pixels_do(mode, height, width):
    transform = Transform(size=24, mode=mode, fill=0)
    x0, y0, x1, y1 = box = (width // 2 - 6, height // 2 - 9, width // 2 + 8, height // 2 + 7)
    pixels = torch.zeros(height, width, 3, dtype=torch.uint8)
    pixels[y0:y1, x0:x1] = 255
    moved = transform.boxes(torch.tensor([box, (0, 0, width, height)], dtype=torch.float32), height, width)
    weight = transform(pixels)[0].float() / 255
    # How much of each row and column is covered: resampling keeps the area and the centre.
    for axis, (low, high) in enumerate([(moved[0, 0], moved[0, 2]), (moved[0, 1], moved[0, 3])]):
        profile = weight.sum(axis)
        centre = (profile * (torch.arange(24) + 0.5)).sum() / profile.sum() / 24
        assert abs(centre - (low + high) / 2) < 0.02
    area = (moved[0, 2:] - moved[0, :2]).prod()
    assert abs(weight.sum() / 24**2 - area) < 0.02
    assert mode in ("crop", "centre") or ((moved[1] > -1e-6) & (moved[1] < 1 + 1e-6)).all()
