"""Images of any size to the model's square. Pixels stay uint8; they are normalised on the device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvlp.errors import UserError

Rectangle = tuple[int, int, int, int]  # left, top, width, height in pixels

# How an image becomes a square.
Fit = Literal["crop", "centre", "squash", "letterbox"]
# Share of the short side that `centre` takes: ImageNet models resize it to 256 pixels, and cut 224 from the middle.
CENTRE = 7 / 8
# Of a picture that is longer than so many times its short side, the ends are cut off before it is resized: a strip of 2 x
# 10,000 pixels, resized by its short side, would take gigabytes.
LONGEST = 4


@dataclass(frozen=True, kw_only=True)
class Transform:
    """Resamples an image, uint8 [H W 3], to uint8 [3 size size] (bicubic, antialiased).

    Attributes:
        size: pixels of a side.
        mode: `crop` takes the central square (as in CLIP); `centre` takes the middle seven eighths of that square (as in
            DINOv2); `squash` takes the whole image and changes its aspect ratio; `letterbox` takes the whole image, keeps its
            aspect ratio, and fills the rest of the square. `crop` and `centre` resize first, so that pixels are where
            torchvision and transformers have them.
        fill: grey level with which `letterbox` fills the square.
    """

    size: int
    mode: Fit = "crop"
    fill: int = 128

    def __post_init__(self) -> None:
        if self.size < 1:
            raise UserError(f"`size` {self.size}: must be at least 1 pixel")
        if self.mode not in ("crop", "centre", "squash", "letterbox"):
            raise UserError(f"`mode` {self.mode!r}: choose crop, centre, squash or letterbox")

    def least(self, height: int, width: int) -> tuple[int, int]:
        """The smallest (height, width) to which a decoder may scale an image of this size without making it too small."""
        if self.mode == "letterbox":
            return (self.size, 1) if height >= width else (1, self.size)
        side = round(self.size / CENTRE) if self.mode == "centre" else self.size
        return side, side

    def __call__(self, pixels_HWC: Tensor) -> Tensor:
        height, width, _ = pixels_HWC.shape
        (x, y, w, h), (to_x, to_y, to_w, to_h) = self._moves(height, width)
        part = _resize(pixels_HWC[y : y + h, x : x + w], to_h, to_w)
        top, left = max(0, -to_y), max(0, -to_x)
        part = part[:, top : top + self.size, left : left + self.size]
        if part.shape[1:] == (self.size, self.size):
            return part.contiguous()
        square = torch.full((3, self.size, self.size), self.fill, dtype=torch.uint8)
        square[:, to_y : to_y + to_h, to_x : to_x + to_w] = part
        return square

    def boxes(self, box_R4: Tensor, height: int, width: int) -> Tensor:
        """Boxes x0 y0 x1 y1 in pixels of an image of this size as fractions of the square; below 0 or above 1 where a box
        reaches beyond the square. For a JPEG decoded at a smaller scale they are right to a pixel."""
        (x, y, w, h), (to_x, to_y, to_w, to_h) = self._moves(height, width)
        along, down = to_w / w, to_h / h
        shift_4 = torch.tensor([to_x - x * along, to_y - y * down] * 2)
        return (box_R4 * torch.tensor([along, down] * 2) + shift_4) / self.size

    def _moves(self, height: int, width: int) -> tuple[Rectangle, Rectangle]:
        """The part of an image that is resized, and where it then lies; what is outside the square is cut off."""
        if self.mode in ("crop", "centre"):
            short = min(height, width)
            w, h = min(width, LONGEST * short), min(height, LONGEST * short)
            to_short = round(self.size / CENTRE) if self.mode == "centre" else self.size
            # Rounded as transformers does.
            to_w, to_h = int(to_short * w / short), int(to_short * h / short)
            source = (width - w) // 2, (height - h) // 2, w, h
            return source, (-((to_w - self.size) // 2), -((to_h - self.size) // 2), to_w, to_h)
        if self.mode == "squash":
            return (0, 0, width, height), (0, 0, self.size, self.size)
        scale = self.size / max(height, width)
        w, h = max(1, round(width * scale)), max(1, round(height * scale))
        return (0, 0, width, height), ((self.size - w) // 2, (self.size - h) // 2, w, h)


def _resize(pixels_HWC: Tensor, height: int, width: int) -> Tensor:
    """uint8 [3 height width]; no copy where the size is right."""
    # With the batch dimension before the permutation, PyTorch sees the order that its vectorised kernel for three channels
    # reads as it is; with it after that, each picture is unpacked and packed again, in 1.4 times the time.
    image_CHW = pixels_HWC[None].permute(0, 3, 1, 2)
    if image_CHW.shape[2:] == (height, width):
        return image_CHW[0]
    # It agrees with Pillow's bicubic to 2 of 255 levels.
    return F.interpolate(image_CHW, size=(height, width), mode="bicubic", antialias=True, align_corners=False)[0]
