import colorsys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance

from fastvlp.data.augment import AugmentConfig, augment, draw_crops, draw_jitter, draw_sigma
from fastvlp.errors import UserError

SEED = torch.arange(40) * 7919 + 3
SIMCLR = AugmentConfig(crop=(0.1, 1.0), flip=0.5, jitter=0.8, gray=0.2, blur=0.5)


def pictures(B: int, n: int = 24) -> torch.Tensor:
    """Smooth, so that no resampling is blamed for noise: uint8 [B 3 n n]."""
    noise = torch.rand(B, 3, 5, 5, generator=torch.Generator().manual_seed(1))
    return (F.interpolate(noise, size=(n, n), mode="bicubic").clamp(0, 1) * 255).round().to(torch.uint8)


def pillow(image: torch.Tensor) -> Image.Image:
    return Image.fromarray(image.permute(1, 2, 0).numpy())


def levels(a: torch.Tensor, b) -> int:
    """The largest difference of two uint8 images."""
    b = torch.from_numpy(np.array(b)).permute(2, 0, 1) if isinstance(b, Image.Image) else b
    return int((a.int() - b.int()).abs().max())


# --- crop ------------------------------------------------------------------------------------------------------------


def test_crops_are_pillows_bicubic_of_the_same_part():
    image = pictures(40)
    out, _ = augment(image, SEED, AugmentConfig(crop=(0.05, 1.0)))
    exact, _ = augment(image.float() / 255, SEED, AugmentConfig(crop=(0.05, 1.0)))
    for b, part in enumerate(draw_crops(SEED, (0.05, 1.0), 0).tolist()):
        box = [24 * x for x in part]
        # Bytes are rounded between Pillow's two passes, floats are not.
        assert levels(out[b], pillow(image[b]).resize((24, 24), Image.Resampling.BICUBIC, box=box)) <= 2
        for channel, got in zip(image[b].float().numpy(), exact[b]):
            expected = np.asarray(Image.fromarray(channel).resize((24, 24), Image.Resampling.BICUBIC, box=box))
            assert np.abs(expected.clip(0, 255) - 255 * got.numpy()).max() < 2e-3


def test_the_drawn_area_and_shape_are_those_asked_for():
    x0, y0, x1, y1 = draw_crops(torch.arange(20_000), (0.2, 0.6), 0).unbind(1)
    assert min(x0.min(), y0.min()) >= 0 and max(x1.max(), y1.max()) <= 1
    area, ratio = (x1 - x0) * (y1 - y0), (x1 - x0) / (y1 - y0)
    assert 0.2 - 1e-5 < area.min() < 0.201 and 0.599 < area.max() < 0.6 + 1e-5
    assert abs(area.mean() - 0.4) < 0.003
    assert 0.75 - 1e-5 < ratio.min() < 0.752 and 1.33 < ratio.max() < 4 / 3 + 1e-5
    assert abs(ratio.log().mean()) < 0.005
    # Anywhere: the share of the room left over that lies before the part.
    for place in (x0 / (1 - (x1 - x0)), y0 / (1 - (y1 - y0))):
        assert abs(place.mean() - 0.5) < 0.01 and abs(place.var() - 1 / 12) < 0.003


def test_a_crop_that_fits_nowhere_is_the_whole_image():
    whole = torch.tensor([0.0, 0, 1, 1])
    assert draw_crops(SEED, (1.0, 1.0), 0).eq(whole).all()
    drawn = draw_crops(torch.arange(4000), (0.99, 1.0), 0)
    assert 0.005 < drawn.eq(whole).all(1).float().mean() < 0.9
    image = pictures(4)
    assert torch.equal(augment(image, SEED[:4], AugmentConfig(crop=(1.0, 1.0)))[0], image)


# --- flip ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", [torch.uint8, torch.float32])
def test_flips_of_images_and_boxes_are_exact(to):
    image = pictures(40).to(to)
    box = (
        torch.rand(40, 3, 2, generator=torch.Generator().manual_seed(2))
        .sort(-1)
        .values.repeat(1, 1, 2)[..., [0, 2, 1, 3]]
    )
    out, moved = augment(image, SEED, AugmentConfig(flip=1.0), box)
    assert torch.equal(out, image.flip(-1))
    assert torch.equal(moved, torch.stack([1 - box[..., 2], box[..., 1], 1 - box[..., 0], box[..., 3]], -1))
    out, moved = augment(image, SEED, AugmentConfig(flip=0.5), box)
    flipped = (out == image.flip(-1)).flatten(1).all(1)
    assert torch.equal(out[~flipped], image[~flipped]) and 10 < flipped.sum() < 30
    assert torch.equal((moved != box).flatten(1).any(1), flipped)


# --- boxes -----------------------------------------------------------------------------------------------------------


def test_boxes_follow_their_pixels():
    image = torch.zeros(40, 3, 64, 64, dtype=torch.uint8)
    image[:, :, 20:44, 12:36] = 255
    box = torch.tensor([12, 20, 36, 44]).div(64).expand(40, 1, 4)
    out, moved = augment(image, SEED, AugmentConfig(crop=(0.3, 1.0), flip=0.5), box)
    for b in range(40):
        bright = (out[b, 0] > 127).nonzero()
        seen = torch.cat([bright.amin(0).flip(0), bright.amax(0).flip(0) + 1]) / 64
        assert (seen - moved[b, 0]).abs().max() < 1.01 / 64


def test_a_box_that_leaves_becomes_zeros_and_no_crop_loses_all():
    corner, padding = [0.0, 0.0, 0.1, 0.1], [0.0] * 4
    box = torch.tensor([corner, [0.5, 0.5, 0.9, 0.9], padding]).expand(40, 3, 4)
    _, moved = augment(pictures(40), SEED, AugmentConfig(crop=(0.1, 0.3)), box)
    area = (moved[..., 2:] - moved[..., :2]).clamp(min=0).prod(-1)
    left = area == 0
    assert moved[left].eq(0).all() and left[:, 2].all() and 5 < left[:, 0].sum() < 40
    assert not left.all(1).any() and moved.min() >= 0 and moved.max() <= 1
    alone, _ = augment(pictures(40), SEED, AugmentConfig(crop=(0.1, 0.3)), box[:, :1])
    free, _ = augment(pictures(40), SEED, AugmentConfig(crop=(0.1, 0.3)))
    kept = (alone == pictures(40)).flatten(1).all(1)
    assert 5 < kept.sum() < 40 and torch.equal(alone[~kept], free[~kept])


def test_rows_without_boxes_are_cropped_all_the_same():
    free, _ = augment(pictures(40), SEED, AugmentConfig(crop=(0.1, 0.3)))
    padded, _ = augment(pictures(40), SEED, AugmentConfig(crop=(0.1, 0.3)), torch.zeros(40, 2, 4))
    assert torch.equal(free, padded)


# --- colour ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", range(3))
def test_each_jitter_is_pillows(which):
    enhance = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)[which]
    strength = tuple(0.4 if i == which else 0.0 for i in range(4))
    image = pictures(40)
    out, _ = augment(image, SEED, AugmentConfig(jitter=1.0, strength=strength))
    factor = draw_jitter(SEED, strength, 0)[which]
    assert factor.min() < 0.7 and factor.max() > 1.3 and (factor - 1).abs().max() <= 0.4
    for b in range(40):
        assert levels(out[b], enhance(pillow(image[b])).enhance(float(factor[b]))) <= 1


def test_hue_turns_as_colorsys_says():
    image = torch.rand(6, 3, 5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    image[0, 1] = image[0, 0]  # ties between channels
    image[1, 1:] = image[1, :1]  # grey, which has no hue to turn
    strength = (0.0, 0.0, 0.0, 0.5)
    out, _ = augment(image, SEED[:6], AugmentConfig(jitter=1.0, strength=strength))
    turn = draw_jitter(SEED[:6], strength, 0)[3]
    for b in range(6):
        for pixel, got in zip(image[b].flatten(1).T.tolist(), out[b].flatten(1).T):
            h, s, v = colorsys.rgb_to_hsv(*pixel)
            assert torch.allclose(got, torch.tensor(colorsys.hsv_to_rgb((h + float(turn[b])) % 1, s, v)), atol=2e-6)


def test_jitter_goes_in_its_stated_order_for_the_drawn_rows_alone():
    image = torch.rand(40, 3, 6, 6, generator=torch.Generator().manual_seed(3))
    out, _ = augment(image, SEED, AugmentConfig(jitter=0.5, strength=(0.4, 0.4, 0.4, 0.0)))
    drawn = 0
    for b, (brightness, contrast, saturation, _) in enumerate(zip(*draw_jitter(SEED, (0.4, 0.4, 0.4, 0.0), 0))):
        if torch.equal(out[b], image[b]):
            continue
        drawn += 1
        x = (brightness * image[b].double()).clamp(0, 1)
        weight = torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64)[:, None, None]
        x = (contrast * x + (1 - contrast) * (weight * x).sum(0).mean()).clamp(0, 1)
        x = (saturation * x + (1 - saturation) * (weight * x).sum(0)).clamp(0, 1)
        assert (out[b] - x).abs().max() < 2e-6
    assert 10 < drawn < 30


def test_gray_is_pillows_luma_in_every_channel():
    image = pictures(40)
    out, _ = augment(image, SEED, AugmentConfig(gray=0.5))
    gray = [levels(out[b], pillow(image[b]).convert("L").convert("RGB")) <= 1 for b in range(40)]
    assert 10 < sum(gray) < 30
    assert all(g or torch.equal(out[b], image[b]) for b, g in enumerate(gray))


# --- blur ------------------------------------------------------------------------------------------------------------


def test_blur_is_a_gaussian_over_what_is_in_the_image():
    image = pictures(6, 30).float() / 255
    out, _ = augment(image, SEED[:6], AugmentConfig(blur=1.0, sigma=(0.5, 2.0)))
    sigmas = draw_sigma(SEED[:6], (0.5, 2.0), 0)
    assert sigmas.min() >= 0.5 and sigmas.max() <= 2 and sigmas.std() > 0.1
    for b, sigma in enumerate(sigmas.double()):
        kernel = torch.exp(-(torch.arange(-29, 30).double() ** 2) / (2 * sigma**2))
        kernel = (kernel[:, None] * kernel)[None, None]
        x = image[b].double()[:, None]
        expected = F.conv2d(x, kernel, padding=29) / F.conv2d(torch.ones_like(x), kernel, padding=29)
        assert (out[b] - expected[:, 0]).abs().max() < 1e-5


# --- the whole -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("image", [pictures(5), torch.rand(5, 3, 8, 8), torch.rand(5, 3, 8, 8).half()])
def test_nothing_asked_changes_nothing(image):
    box = torch.rand(5, 2, 4)
    out, moved = augment(image, SEED[:5], AugmentConfig(), box)
    assert torch.equal(out, image) and torch.equal(moved, box) and out.dtype == image.dtype
    assert augment(image, SEED[:5], AugmentConfig())[1] is None


def test_a_row_does_not_see_its_neighbours():
    image, box = pictures(40), torch.tensor([0.2, 0.3, 0.6, 0.9]).expand(40, 2, 4)
    whole, moved = augment(image, SEED, SIMCLR, box)
    parts = [augment(image[i : i + 7], SEED[i : i + 7], SIMCLR, box[i : i + 7]) for i in range(0, 40, 7)]
    assert levels(whole, torch.cat([part for part, _ in parts])) <= 1
    assert torch.equal(moved, torch.cat([part for _, part in parts]))


def test_views_and_seeds_differ_and_repeat():
    image = pictures(40)
    first, second = (augment(image, SEED, SIMCLR, view=view)[0] for view in (0, 1))
    assert torch.equal(first, augment(image, SEED, SIMCLR)[0])
    assert not (first == second).flatten(1).all(1).any()
    a, b = (draw_crops(SEED, (0.1, 1.0), view).flatten() for view in (0, 1))
    assert abs(torch.corrcoef(torch.stack([a - a.mean(), b - b.mean()]))[0, 1]) < 0.95
    same = augment(image[:1].expand(40, -1, -1, -1), SEED, SIMCLR)[0]
    assert len(same.flatten(1).unique(dim=0)) == 40


def test_float_images_agree_with_bytes_and_stay_in_range():
    image = pictures(40)
    exact, _ = augment(image.float() / 255, SEED, SIMCLR)
    rounded, _ = augment(image, SEED, SIMCLR)
    assert exact.min() >= 0 and exact.max() <= 1
    assert (exact * 255 - rounded).abs().max() <= 0.51


def test_autocast_does_not_coarsen_pixels():
    image = pictures(8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast, _ = augment(image, SEED[:8], SIMCLR)
    assert torch.equal(cast, augment(image, SEED[:8], SIMCLR)[0])


@pytest.mark.parametrize(
    "bad",
    [
        *[{"crop": (0.0, 1.0)}, {"crop": (0.9, 0.5)}, {"crop": (0.5, 1.2)}, {"flip": 1.5}, {"jitter": -0.1}],
        *[{"strength": (0.4, 0.4, 0.4, 0.6)}, {"strength": (1.5, 0.4, 0.4, 0.1)}, {"sigma": (0.0, 1.0)}],
    ],
)
def test_bad_settings_are_refused(bad):
    with pytest.raises(UserError, match=f"augment.{next(iter(bad))}"):
        AugmentConfig(**bad)
