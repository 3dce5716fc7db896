"""Augmentation of whole batches on the device: RandAugment as in FLM's fine-tuning (arXiv 2303.14038), random crops, flips,
colour jitter, grayscale and blur, as in FLIP (2212.00794), BriVL (2103.06561), SimCLR (2002.05709) and MoCo v2 (2003.04297).

Every draw is a hash of the row's seed, and every operation is one call for all rows. Cropping and blurring are linear along
each axis, so each needs two matrix products for a row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fastvlp.batch import has_area
from fastvlp.data.rand_augment import MOST, rand_augment
from fastvlp.errors import UserError
from fastvlp.random import uniform

CROP_SALT, CHANCE_SALT, JITTER_SALT, BLUR_SALT = 801, 802, 803, 804
VIEW = 1 << 20  # distance of the salts of two views of a row
TRIES = 10
ASPECT = 4 / 3


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Random changes of the training images, in the order of these options. By default nothing changes."""

    operations: int = 0
    """RandAugment (arXiv 1909.13719): number of operations that are drawn for each image, such as rotating, shearing or
    equalizing (FLM's fine-tuning: 2). Not for images with boxes."""
    magnitude: float = 9.0
    """Strength of these operations, from 0 to 30 (FLM's fine-tuning: 9)."""
    crop: tuple[float, float] | None = None
    """Smallest and largest area of a random crop, as a share of the image. The crop is scaled to the size of the image; its
    aspect ratio is 3:4 to 4:3 (FLIP: 0.5, 1; MoCo v2: 0.2, 1)."""
    flip: float = 0.0
    """Share of rows that are mirrored left to right."""
    jitter: float = 0.0
    """Share of rows whose colours change (BriVL: 0.8)."""
    strength: tuple[float, float, float, float] = (0.4, 0.4, 0.4, 0.1)
    """Largest change s of brightness, contrast, saturation and hue. The first three are multiplied by 1 - s to 1 + s, and hue
    is rotated by -s to s turns, always in this order (torchvision draws the order)."""
    gray: float = 0.0
    """Share of rows that lose their colour (BriVL, MoCo v2: 0.2)."""
    blur: float = 0.0
    """Share of rows that are blurred by a Gaussian (MoCo v2: 0.5)."""
    sigma: tuple[float, float] = (0.1, 2.0)
    """Smallest and largest standard deviation of the Gaussian, in pixels."""

    def __post_init__(self) -> None:
        for name in ("flip", "jitter", "gray", "blur"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"`augment.{name}` is a share of the rows, 0 to 1, not {getattr(self, name)}")
        if self.operations < 0 or not 0 <= self.magnitude <= MOST:
            raise UserError(
                f"`augment.operations` is at least 0, not {self.operations}; `augment.magnitude` is from 0 to {MOST}, not "
                f"{self.magnitude}"
            )
        if self.crop is not None and not 0 < self.crop[0] <= self.crop[1] <= 1:
            raise UserError(
                f"`augment.crop` is the smallest and the largest area, above 0 and up to 1, not {self.crop}"
            )
        if not all(0 <= s <= most for s, most in zip(self.strength, (1, 1, 1, 0.5))):
            raise UserError(
                f"`augment.strength` is at most 1 for brightness, contrast and saturation, and 0.5 for hue, not {self.strength}"
            )
        if not 0 < self.sigma[0] <= self.sigma[1]:
            raise UserError(f"`augment.sigma` is the smallest and the largest deviation in pixels, not {self.sigma}")


def augment(
    image_BCHW: Tensor, seed_B: Tensor, config: AugmentConfig, box_BR4: Tensor | None = None, view: int = 0
) -> tuple[Tensor, Tensor | None]:
    """Returns a random view of each image, and the boxes in that view.

    Args:
        image_BCHW: [B 3 n n], uint8, or float from 0 to 1. The view has the same type; it is computed in fp32 and rounded
            once.
        seed_B: `Batch.seed`. The view of a row depends only on its own image, boxes and seed.
        box_BR4: `Regions.box`. A box is cut at the edge of the view, and becomes zeros if nothing of it is left. A row is not
            cropped if the crop would leave it no box.
        view: number of the draw, for objectives that compare two views of an image (SimCLR).
    """
    if config.operations and box_BR4 is not None:
        raise UserError("`augment.operations` cannot move boxes with their images; set it to 0 for data with boxes")
    x = image_BCHW.float() / 255 if image_BCHW.dtype == torch.uint8 else image_BCHW.float()
    chance = chances(seed_B, view)[..., None, None, None].unbind(1)
    # bf16 and fp16 represent a position with 8 or 11 bits, which is too inaccurate for the weights of a crop.
    with torch.no_grad(), torch.autocast(image_BCHW.device.type, enabled=False):
        if config.operations:
            x = rand_augment((x * 255).round(), seed_B, config.operations, config.magnitude, view) / 255
        if config.crop is not None:
            part_B4 = draw_crops(seed_B, config.crop, view)
            if box_BR4 is not None:
                part_B4, box_BR4 = take_crops(part_B4, box_BR4)
            x = _apply_along_axes(x, cubic(part_B4[:, 1::2], x.shape[2]), cubic(part_B4[:, ::2], x.shape[3])).clamp(
                0, 1
            )
        if config.flip:
            flip = chance[0] < config.flip
            x = torch.where(flip, x.flip(-1), x)
            if box_BR4 is not None:
                box_BR4 = torch.where(flip[..., 0], flip_boxes(box_BR4), box_BR4)
        if config.jitter:
            x = torch.where(
                chance[1] < config.jitter, jitter_colours(x, *draw_jitter(seed_B, config.strength, view)), x
            )
        if config.gray:
            x = torch.where(chance[2] < config.gray, luma(x), x)
        if config.blur:
            weight = gaussian(draw_sigma(seed_B, config.sigma, view), x.shape[2])
            x = torch.where(chance[3] < config.blur, _apply_along_axes(x, weight, weight), x)
    return ((x * 255).round() if image_BCHW.dtype == torch.uint8 else x).to(image_BCHW.dtype), box_BR4


def chances(seed_B: Tensor, view: int = 0) -> Tensor:
    """Random numbers from 0 to 1 [B 4]. Where one is below the share of such rows, the row is mirrored, changed in colour, made
    grey or blurred."""
    return uniform(seed_B, (4,), CHANCE_SALT + VIEW * view)


def is_mirrored(seed: int, flip: float) -> bool:
    """Whether `augment` mirrors the row of this seed, where it mirrors this share of the rows."""
    return bool(chances(torch.tensor([seed], dtype=torch.int64))[0, 0] < flip)


def draw_crops(seed_B: Tensor, area: tuple[float, float], view: int) -> Tensor:
    """Random parts x0 y0 x1 y1 [B 4] as fractions: the first of ten tries that fits into the image, or the whole image."""
    size, shape, x, y = uniform(seed_B, (TRIES, 4), CROP_SALT + VIEW * view).unbind(-1)
    size = area[0] + (area[1] - area[0]) * size
    shape = torch.exp((2 * shape - 1) * math.log(ASPECT))
    side = torch.stack([(size * shape).sqrt(), (size / shape).sqrt()], -1)
    start = torch.stack([x, y], -1) * (1 - side)
    fits = (side <= 1).all(-1)
    first = fits.int().argmax(1)[:, None, None].expand(-1, 1, 4)
    part = torch.cat([start, start + side], -1).gather(1, first)[:, 0]
    return torch.where(fits.any(1, keepdim=True), part, whole(part))


def whole(part_B4: Tensor) -> Tensor:
    """The whole image for each row: 0 0 1 1 [B 4]."""
    return torch.cat([torch.zeros_like(part_B4[:, :2]), torch.ones_like(part_B4[:, 2:])], 1)


def take_crops(part_B4: Tensor, box_BR4: Tensor) -> tuple[Tensor, Tensor]:
    """The crops, or the whole image for a row whose crop would leave it no box; and the boxes as fractions of these."""
    start, end = part_B4[:, None, :2], part_B4[:, None, 2:]
    corners = [(corner - start) / (end - start) for corner in box_BR4.split(2, -1)]
    moved = torch.cat(corners, -1).clamp(0, 1)
    moved = moved * has_area(moved)[..., None]
    lost_B1 = has_area(box_BR4).any(1, keepdim=True) & ~has_area(moved).any(1, keepdim=True)
    return torch.where(lost_B1, whole(part_B4), part_B4), torch.where(lost_B1[..., None], box_BR4, moved)


def flip_boxes(box_BR4: Tensor) -> Tensor:
    """Boxes mirrored left to right; zeros stay zeros."""
    x0, y0, x1, y1 = box_BR4.unbind(-1)
    return torch.where(has_area(box_BR4)[..., None], torch.stack([1 - x1, y0, 1 - x0, y1], -1), box_BR4)


def cubic(ends_B2: Tensor, n: int) -> Tensor:
    """Weights [B n n] of an axis's n pixels for n samples between two fractions of it: bicubic, a = -1/2, and scaled to a sum
    of 1 at the edges, as Pillow's. The part between the fractions is only ever enlarged, so nothing aliases."""
    start, end = ends_B2[:, :1], ends_B2[:, 1:]
    pixel = torch.arange(n, device=ends_B2.device)
    at_Bn = (start + (end - start) * (pixel + 0.5) / n) * n - 0.5
    d = (at_Bn[..., None] - pixel).abs()
    near, far = (1.5 * d - 2.5) * d * d + 1, ((2.5 - 0.5 * d) * d - 4) * d + 2
    weight = torch.where(d < 1, near, torch.where(d < 2, far, 0))
    return weight / weight.sum(-1, keepdim=True)


def gaussian(sigma_B: Tensor, n: int) -> Tensor:
    """Weights [B n n] of an axis's n pixels for a Gaussian around each of them, with a sum of 1 at the edges too."""
    pixel = torch.arange(n, device=sigma_B.device)
    return (-((pixel[:, None] - pixel) ** 2) / (2 * sigma_B[:, None, None] ** 2)).softmax(-1)


def _apply_along_axes(x_BCHW: Tensor, vertical_BnH: Tensor, horizontal_BnW: Tensor) -> Tensor:
    return torch.einsum("bih,bchw,bjw->bcij", vertical_BnH, x_BCHW, horizontal_BnW)


def draw_jitter(seed_B: Tensor, strength: tuple[float, float, float, float], view: int) -> tuple[Tensor, ...]:
    """Random factors of brightness, contrast and saturation, and turns of the hue: four tensors [B]."""
    draw = uniform(seed_B, (4,), JITTER_SALT + VIEW * view).unbind(1)
    return tuple(centre + most * (2 * u - 1) for centre, most, u in zip((1, 1, 1, 0), strength, draw))


def jitter_colours(x_BCHW: Tensor, *factors_B: Tensor) -> Tensor:
    """Changes brightness, contrast, saturation and hue by what `draw_jitter` drew."""
    brightness, contrast, saturation, turn = (factor[:, None, None, None] for factor in factors_B)
    x = (x_BCHW * brightness).clamp(0, 1)
    x = torch.lerp(luma(x).mean((1, 2, 3), keepdim=True), x, contrast).clamp(0, 1)
    x = torch.lerp(luma(x), x, saturation).clamp(0, 1)
    return turn_hue(x, turn[:, 0])


def luma(x_BCHW: Tensor) -> Tensor:
    """Perceived brightness (ITU-R BT.601): [B 1 H W]."""
    red, green, blue = x_BCHW.split(1, 1)
    return 0.299 * red + 0.587 * green + 0.114 * blue


def turn_hue(x_BCHW: Tensor, turn: Tensor) -> Tensor:
    """Adds turns to the hue of HSV. Within each sixth of a turn one channel rises or falls between the lowest and the value."""
    red, green, blue = x_BCHW.unbind(1)
    value, low = x_BCHW.amax(1), x_BCHW.amin(1)
    chroma = value - low
    span = torch.where(chroma > 0, chroma, 1)
    sixth = torch.where(value == green, 2 + (blue - red) / span, 4 + (red - green) / span)
    sixth = torch.where(value == red, (green - blue) / span, sixth) + 6 * turn
    place = [(sixth + n) % 6 for n in (5, 3, 1)]
    return torch.stack([value - chroma * torch.minimum(k, 4 - k).clamp(0, 1) for k in place], 1)


def draw_sigma(seed_B: Tensor, sigma: tuple[float, float], view: int) -> Tensor:
    """Random standard deviations [B]."""
    return sigma[0] + (sigma[1] - sigma[0]) * uniform(seed_B, (), BLUR_SALT + VIEW * view)
