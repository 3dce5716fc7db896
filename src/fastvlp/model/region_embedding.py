"""Regions of a picture: what is known of a box's content, and where the box is (UNITER, arXiv 1909.11740, section 3.1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvlp.batch import Regions
from fastvlp.errors import UserError
from fastvlp.model.layers import LayerConfig
from fastvlp.random import uniform

HIDE_SALT = 102


@dataclass(frozen=True, kw_only=True)
class RegionConfig:
    """feature: width of a region's vector, a detector's. crop: where there is no detector, the region's own pixels at
    crop x crop points are its feature, 3 * crop**2 numbers. pool: or the states of the image tower in it, the mean of
    pool x pool samples of their map; the tower is trained along, and `feature` is its width. mask: what stands for a
    hidden region's feature, a learned vector (the released code) or zeros (the paper)."""

    feature: int = 2048
    crop: int | None = None
    pool: int | None = None
    mask: Literal["learned", "zero"] = "learned"

    @property
    def width(self) -> int:
        return 3 * self.crop**2 if self.crop else self.feature


def box_vector(box_BR4: Tensor) -> Tensor:
    """(x0, y0, x1, y1) as fractions of the picture -> (x0, y0, x1, y1, w, h, w*h): [B R 7]."""
    size = box_BR4[..., 2:] - box_BR4[..., :2]
    return torch.cat([box_BR4, size, size.prod(-1, keepdim=True)], -1)


def crop_regions(image_B3HW: Tensor, box_BR4: Tensor, side: int) -> Tensor:
    """uint8 pixels of each box, bilinear at side x side points, in -1..1 -> [B R 3*side*side], channel by channel."""
    B, R = box_BR4.shape[:2]
    step = (torch.arange(side, device=box_BR4.device) + 0.5) / side
    low, size = box_BR4[..., :2], box_BR4[..., 2:] - box_BR4[..., :2]
    x_BRS, y_BRS = (low[..., i, None] + size[..., i, None] * step for i in (0, 1))
    grid = torch.stack(torch.broadcast_tensors(x_BRS[:, :, None, :], y_BRS[:, :, :, None]), -1) * 2 - 1
    pixels = F.grid_sample(
        image_B3HW.float() / 127.5 - 1, grid.flatten(1, 2).float(), padding_mode="border", align_corners=False
    )
    return pixels.unflatten(2, (R, side)).transpose(1, 2).reshape(B, R, -1)


def given(regions: Regions | None) -> Regions:
    """A batch's regions, which the data brings where it is told to."""
    if regions is None:
        raise UserError("the model reads regions, and the data brings none; give data.regions, which says whence")
    return regions


def region_features(config: RegionConfig, image_B3HW: Tensor, regions: Regions | None) -> Tensor:
    """[B R F]: what came with the regions, or their pixels."""
    regions = given(regions)
    if config.crop:
        return crop_regions(image_B3HW, regions.box, config.crop)
    if regions.feature is None or regions.feature.shape[-1] != config.feature:
        found = "none" if regions.feature is None else regions.feature.shape[-1]
        raise UserError(
            f"the model reads regions' features of {config.feature} numbers, and the data brings {found}; set "
            f"model.single.regions.feature, or model.single.regions.crop or pool to read the image instead"
        )
    return regions.feature


def random_hide(seed_B: Tensor, region_BR: Tensor, rate: float) -> Tensor:
    """Which regions are masked, a function of the row's seed: bool [B R], each of them with probability `rate`, and at
    least one of a row that has any."""
    noise = uniform(seed_B, (region_BR.shape[1],), HIDE_SALT).masked_fill(~region_BR, 2.0)
    return ((noise < rate) | (noise == noise.amin(1, keepdim=True))) & region_BR


# The mean of `box_vector` over boxes whose edges are drawn evenly.
_USUAL = (1 / 3, 1 / 3, 2 / 3, 2 / 3, 1 / 3, 1 / 3, 1 / 9)


class RegionEmbedder(nn.Module):
    """Feature and box vector to the model's width, each with its norm, summed with the type, and a norm of the sum.
    Regions have no order but that of their boxes."""

    def __init__(self, config: RegionConfig, layer: LayerConfig):
        super().__init__()
        norm = lambda: nn.LayerNorm(layer.width, eps=layer.eps)  # noqa: E731
        self.feature = nn.Linear(config.width, layer.width)
        self.feature_norm = norm()
        self.box = nn.Linear(7, layer.width)
        self.box_norm = norm()
        self.norm = norm()
        self.drop = nn.Dropout(layer.dropout)
        self.mask = nn.Parameter(torch.zeros(config.width)) if config.mask == "learned" else None

    @torch.no_grad()
    def centre(self) -> None:
        """The usual box starts at zero: what boxes have in common would be nine tenths of what their norm lets through, and
        training then forgets the rest before it needs it."""
        self.box.bias.copy_(-self.box.weight @ self.box.weight.new_tensor(_USUAL))

    def forward(
        self, feature_BRF: Tensor, box_BR4: Tensor, kind_BRD: Tensor, hidden_BR: Tensor | None = None
    ) -> Tensor:
        """[B R D]. `kind`: type vectors, of any shape that fits. Where `hidden` the feature is masked, the box is not."""
        feature = feature_BRF.to(self.feature.weight.dtype)
        if hidden_BR is not None:
            mask = feature.new_zeros(()) if self.mask is None else self.mask
            feature = torch.where(hidden_BR[..., None], mask, feature)
        place = box_vector(box_BR4.to(feature.dtype))
        x = self.feature_norm(self.feature(feature)) + self.box_norm(self.box(place)) + kind_BRD
        return self.drop(self.norm(x))
