"""RandAugment (Cubuk et al., arXiv 1909.13719): a few operations, drawn for each image, all of one magnitude.

The operations and ranges are those with which FLM fine-tunes (arXiv 2303.14038, after ViLT, 2102.03334): without inverting
colours, which captions name, and without cutting parts out. Each computes what Pillow's operation of that name does, on many
images at once. Images are [B 3 H W], float, whole numbers from 0 to 255.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvlp.random import uniform

SALT = 805
# Magnitudes are counted up to this one.
MOST = 30


def rand_augment(image_BCHW: Tensor, seed_B: Tensor, operations: int, magnitude: float, view: int = 0) -> Tensor:
    """Applies `operations` drawn operations to each image, one after the other.

    Args:
        image_BCHW: whole numbers from 0 to 255 as float.
        seed_B: `Batch.seed`; what is drawn for a row depends on its own seed.
        magnitude: from 0 to 30.
        view: each number is another draw. (Its salts lie as far apart as those of `augment`.)
    """
    draw_BN2 = uniform(seed_B, (operations, 2), SALT + (view << 20))
    sign_BN = torch.where(draw_BN2[..., 1] < 0.5, -1.0, 1.0)
    picks = (draw_BN2[..., 0] * len(OPERATIONS)).long().tolist()
    image_BCHW = image_BCHW.clone()
    for step in range(operations):
        for number, operation in enumerate(OPERATIONS):
            rows = [row for row, own in enumerate(picks) if own[step] == number]
            if rows:
                image_BCHW[rows] = operation(image_BCHW[rows], magnitude / MOST, sign_BN[rows, step])
    return image_BCHW


def autocontrast(x: Tensor, level: float, sign_B: Tensor) -> Tensor:
    """Stretches each channel to the range from 0 to 255."""
    low, high = x.amin((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
    scale = 255 / (high - low).clamp_min(1)
    return torch.where(high > low, ((x - low) * scale + 1e-4).floor().clamp(0, 255), x)


def equalize(x: Tensor, level: float, sign_B: Tensor) -> Tensor:
    """Gives each channel about as many pixels of each value."""
    flat = x.flatten(2).long()
    count = torch.zeros(*flat.shape[:2], 256, dtype=torch.long, device=x.device)
    count.scatter_add_(2, flat, torch.ones_like(flat))
    last = count.gather(2, flat.amax(2, keepdim=True))
    step = (flat.shape[2] - last) // 255
    table = (step // 2 + count.cumsum(2) - count) // step.clamp_min(1)
    table = torch.where(step > 0, table.clamp(0, 255), torch.arange(256, device=x.device))
    return table.gather(2, flat).view_as(x).to(x.dtype)


def posterize(x: Tensor, level: float, sign_B: Tensor) -> Tensor:
    """Keeps 1 to 4 bits. As in the published code, it is more at a higher magnitude."""
    width = 2 ** (8 - max(1, int(4 * level)))
    return (x / width).floor() * width


def solarize(x: Tensor, level: float, sign_B: Tensor) -> Tensor:
    """Inverts the values from a threshold on."""
    return torch.where(x < 256 * level, x, 255 - x)


def solarize_add(x: Tensor, level: float, sign_B: Tensor) -> Tensor:
    """Adds up to 110, then inverts the upper half of the values."""
    return solarize((x + int(110 * level)).clamp(0, 255), 0.5, sign_B)


def colour(x: Tensor, level: float, sign_B: Tensor) -> Tensor:
    """Changes the saturation, from grey to more colour."""
    return blend(grey(x), x, level)


def contrast(x: Tensor, level: float, sign_B: Tensor) -> Tensor:
    """Changes the contrast, from the image's mean brightness to more contrast."""
    return blend((grey(x).mean((1, 2, 3), keepdim=True) + 0.5).floor(), x, level)


def brightness(x: Tensor, level: float, sign_B: Tensor) -> Tensor:
    """Changes the brightness, from black to brighter."""
    return blend(torch.zeros_like(x), x, level)


def sharpness(x: Tensor, level: float, sign_B: Tensor) -> Tensor:
    """Changes the sharpness, from a smoothed image to a sharper one. The border is not changed."""
    weight = torch.ones(3, 1, 3, 3, dtype=x.dtype, device=x.device)
    weight[:, :, 1, 1] = 5
    smooth = x.clone()
    smooth[:, :, 1:-1, 1:-1] = (F.conv2d(x, weight, groups=3) / 13 + 0.5).floor()
    return blend(smooth, x, level)


def grey(x: Tensor) -> Tensor:
    """Perceived brightness (ITU-R BT.601), rounded as Pillow does: [B 1 H W]."""
    red, green, blue = x.split(1, 1)
    return ((red * 19595 + green * 38470 + blue * 7471 + 32768) / 65536).floor()


def blend(other: Tensor, x: Tensor, level: float) -> Tensor:
    """Blends two images, from a tenth of the image and nine tenths of the other to 1.9 times the difference between the two."""
    factor = 0.1 + 1.8 * level
    return (other + factor * (x - other)).clamp(0, 255).floor()


def rotate(x: Tensor, level: float, sign_B: Tensor) -> Tensor:
    """Turns by up to 30 degrees about the centre, to the left if the sign is positive."""
    angle_B = sign_B * math.radians(30) * level
    cos, sin = angle_B.cos(), angle_B.sin()
    middle_y, middle_x = x.shape[2] / 2, x.shape[3] / 2
    shift_x = middle_x - cos * middle_x + sin * middle_y
    shift_y = middle_y - sin * middle_x - cos * middle_y
    return affine(x, torch.stack([cos, -sin, shift_x, sin, cos, shift_y], 1))


def shear_x(x: Tensor, level: float, sign_B: Tensor) -> Tensor:
    """Slants by up to 0.3 pixels a row."""
    return affine(x, shifted_identity(sign_B * 0.3 * level, 1))


def shear_y(x: Tensor, level: float, sign_B: Tensor) -> Tensor:
    """Slants by up to 0.3 pixels a column."""
    return affine(x, shifted_identity(sign_B * 0.3 * level, 3))


def translate_x(x: Tensor, level: float, sign_B: Tensor) -> Tensor:
    """Moves sideways by up to 100 / 331 of the width."""
    return affine(x, shifted_identity(sign_B * TRANSLATION * x.shape[3] * level, 2))


def translate_y(x: Tensor, level: float, sign_B: Tensor) -> Tensor:
    """Moves up or down by up to 100 / 331 of the height."""
    return affine(x, shifted_identity(sign_B * TRANSLATION * x.shape[2] * level, 5))


# The published code moves by up to 100 pixels, of images of 331.
TRANSLATION = 100 / 331


def shifted_identity(value_B: Tensor, place: int) -> Tensor:
    """The affine map that changes nothing, with a value added to one of its six numbers: [B 6]."""
    map_B6 = torch.tensor([1.0, 0, 0, 0, 1, 0], device=value_B.device).repeat(len(value_B), 1)
    map_B6[:, place] += value_B
    return map_B6


def affine(x: Tensor, map_B6: Tensor) -> Tensor:
    """The pixel at (a x + b y + c, d x + e y + f) of each image, or black outside: Pillow's `transform`, nearest pixel."""
    height, width = x.shape[2:]
    down, right = torch.meshgrid(
        torch.arange(height, device=x.device) + 0.5, torch.arange(width, device=x.device) + 0.5, indexing="ij"
    )
    a, b, c, d, e, f = map_B6[:, :, None, None].unbind(1)
    from_x, from_y = (a * right + b * down + c).floor(), (d * right + e * down + f).floor()
    inside = (from_x >= 0) & (from_x < width) & (from_y >= 0) & (from_y < height)
    place = (from_y.clamp(0, height - 1) * width + from_x.clamp(0, width - 1)).long().flatten(1)
    moved = x.flatten(2).gather(2, place[:, None].expand(-1, x.shape[1], -1)).view_as(x)
    return torch.where(inside[:, None], moved, 0)


OPERATIONS: tuple[Callable[[Tensor, float, Tensor], Tensor], ...] = (
    autocontrast, equalize, rotate, posterize, solarize, solarize_add, colour, contrast, brightness, sharpness, shear_x,
    shear_y, translate_x, translate_y,
)  # fmt: skip
