"""Regions of an image: what is known of the content of a box, and where the box is (UNITER, arXiv 1909.11740, section 3.1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvlp.batch import Regions
from fastvlp.errors import UserError
from fastvlp.model.encoders.interface import ImageEncoderConfig
from fastvlp.model.layers import LayerConfig
from fastvlp.random import uniform

HIDE_SALT = 102


@dataclass(frozen=True, kw_only=True)
class RegionConfig:
    """The feature of a region in a single stream: a detector's feature, or, where there is no detector, the region's pixels
    (`crop`) or states of the image encoder (`pool`)."""

    feature: int = 2048
    """Width of a region's feature: a detector's or, with `pool`, the image encoder's."""
    crop: int | None = None
    """Points a side at which a region's pixels are its feature, of 3 * crop**2 numbers."""
    pool: int | None = None
    """Samples a side of the image encoder's map whose mean is a region's feature. The encoder is then trained too."""
    mask: Literal["learned", "zero"] = "learned"
    """Replacement of a hidden region's feature: a learned vector (UNITER's released code) or zeros (its paper)."""

    @property
    def width(self) -> int:
        """Numbers in a region's feature."""
        return 3 * self.crop**2 if self.crop else self.feature

    def check(self, image: ImageEncoderConfig) -> None:
        """Raises UserError if regions cannot be pooled from this image encoder."""
        if self.pool is None:
            return
        if self.pool < 1 or self.crop:
            raise UserError(
                "`model.single.regions.pool` is a number of samples on each side, 1 or more, and cannot be combined with crop"
            )
        if self.feature != image.width:
            raise UserError(
                f"`model.single.regions.feature` {self.feature} must be the width of the image encoder's states, which are "
                f"pooled: {image.width}"
            )


def box_vector(box_BR4: Tensor) -> Tensor:
    """Boxes (x0, y0, x1, y1), fractions of the image, as vectors (x0, y0, x1, y1, w, h, w*h): [B R 4] -> [B R 7]."""
    size = box_BR4[..., 2:] - box_BR4[..., :2]
    return torch.cat([box_BR4, size, size.prod(-1, keepdim=True)], -1)


def crop_regions(image_B3HW: Tensor, box_BR4: Tensor, side: int) -> Tensor:
    """Pixels of each box at side x side points, interpolated from uint8 images to -1..1 -> [B R 3*side*side], channel by
    channel."""
    B, R = box_BR4.shape[:2]
    step = (torch.arange(side, device=box_BR4.device) + 0.5) / side
    low, size = box_BR4[..., :2], box_BR4[..., 2:] - box_BR4[..., :2]
    x_BRS, y_BRS = (low[..., i, None] + size[..., i, None] * step for i in (0, 1))
    grid = torch.stack(torch.broadcast_tensors(x_BRS[:, :, None, :], y_BRS[:, :, :, None]), -1) * 2 - 1
    pixels = F.grid_sample(
        image_B3HW.float() / 127.5 - 1, grid.flatten(1, 2).float(), padding_mode="border", align_corners=False
    )
    return pixels.unflatten(2, (R, side)).transpose(1, 2).reshape(B, R, -1)


def require_regions(regions: Regions | None) -> Regions:
    """The regions of a batch. Raises UserError if it has none."""
    if regions is None:
        raise UserError("the model reads regions, but the data have none; set `data.regions`")
    return regions


def region_features(config: RegionConfig, image_B3HW: Tensor, regions: Regions | None) -> Tensor:
    """Features of regions [B R F]: those of the batch, or their pixels. Raises UserError if it has none, or of another
    width."""
    regions = require_regions(regions)
    if config.crop:
        return crop_regions(image_B3HW, regions.box, config.crop)
    if regions.feature is None or regions.feature.shape[-1] != config.feature:
        width = "none" if regions.feature is None else regions.feature.shape[-1]
        raise UserError(
            f"the model reads features of regions of {config.feature} numbers, and the data has {width}; set "
            f"`model.single.regions.feature`, or `model.single.regions.crop` or `model.single.regions.pool` to read the image"
        )
    return regions.feature


def random_hide(seed_B: Tensor, region_BR: Tensor, rate: float, *, salt: int = HIDE_SALT) -> Tensor:
    """Draws the regions that are masked, by the row's seed: bool [B R], each with probability `rate`, and at least one in a
    row with regions."""
    noise = uniform(seed_B, (region_BR.shape[1],), salt).masked_fill(~region_BR, 2.0)
    return ((noise < rate) | (noise == noise.amin(1, keepdim=True))) & region_BR


# The mean over boxes whose edges are drawn uniformly, and that of their `box_vector`.
MEAN_BOX = (1 / 3, 1 / 3, 2 / 3, 2 / 3)
_MEAN_VECTOR = (*MEAN_BOX, 1 / 3, 1 / 3, 1 / 9)


class RegionEmbedder(nn.Module):
    """Regions to vectors of the model's width: the feature and the box, each projected and normalised, and a type vector are
    summed, and the sum is normalised. Regions have no positions but their boxes."""

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
        """Sets the bias of boxes so that the mean box is projected to zero. Otherwise what all boxes have in common is nine
        tenths of their normalised vectors, and training loses the rest before it needs it."""
        self.box.bias.copy_(-self.box.weight @ self.box.weight.new_tensor(_MEAN_VECTOR))

    def forward(
        self, feature_BRF: Tensor, box_BR4: Tensor, kind_BRD: Tensor, hidden_BR: Tensor | None = None
    ) -> Tensor:
        """Vectors of regions [B R D]. `kind_BRD`: type vectors, of any shape that broadcasts. Where `hidden_BR` the feature is
        masked, but not the box."""
        feature = feature_BRF.to(self.feature.weight.dtype)
        if hidden_BR is not None:
            mask = feature.new_zeros(()) if self.mask is None else self.mask
            feature = torch.where(hidden_BR[..., None], mask, feature)
        place = box_vector(box_BR4.to(feature.dtype))
        x = self.feature_norm(self.feature(feature)) + self.box_norm(self.box(place)) + kind_BRD
        return self.drop(self.norm(x))
