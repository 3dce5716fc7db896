"""Pixels of any size to the model's square. Everything stays uint8: it is normalised on the device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvlp.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Transform:
    """uint8 [H W 3] to uint8 [3 size size], by antialiased bicubic resampling.

    size: pixels of a side.
    mode: `crop` keeps the shape and the central square (CLIP's); `squash` keeps everything and changes the shape;
        `letterbox` keeps both and fills the rest of the square with `fill`.
    """

    size: int
    mode: Literal["crop", "squash", "letterbox"] = "crop"
    fill: int = 128

    def __post_init__(self) -> None:
        if self.size < 1:
            raise UserError(f"transform size {self.size}: must be at least 1 pixel")
        if self.mode not in ("crop", "squash", "letterbox"):
            raise UserError(f"transform mode {self.mode!r}: choose crop, squash or letterbox")

    def least(self, height: int, width: int) -> tuple[int, int]:
        """The smallest (height, width) to which a decoder may scale the image without making it too small for this."""
        if self.mode == "letterbox":
            return (self.size, 1) if height >= width else (1, self.size)
        return self.size, self.size

    def __call__(self, pixels_HWC: Tensor) -> Tensor:
        height, width, _ = pixels_HWC.shape
        image = pixels_HWC.permute(2, 0, 1)
        if self.mode == "squash":
            return _resize(image, self.size, self.size)
        if self.mode == "crop":
            # The crop comes first: resizing a strip of 2 x 10,000 pixels by its short side would take gigabytes.
            side = min(height, width)
            top, left = (height - side) // 2, (width - side) // 2
            return _resize(image[:, top : top + side, left : left + side], self.size, self.size)
        scale = self.size / max(height, width)
        h, w = max(1, round(height * scale)), max(1, round(width * scale))
        top, left = (self.size - h) // 2, (self.size - w) // 2
        square = torch.full((3, self.size, self.size), self.fill, dtype=torch.uint8)
        square[:, top : top + h, left : left + w] = _resize(image, h, w)
        return square


def _resize(image_CHW: Tensor, height: int, width: int) -> Tensor:
    if image_CHW.shape[1:] == (height, width):
        return image_CHW.contiguous()
    # On uint8 in HWC order this is the vectorised kernel; it agrees with Pillow's bicubic to 2 of 255 levels.
    resized = F.interpolate(image_CHW[None], size=(height, width), mode="bicubic", antialias=True, align_corners=False)
    return resized[0].contiguous()
