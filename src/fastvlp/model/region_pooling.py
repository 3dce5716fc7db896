"""Regions of an image, pooled from the map of its states (BriVL: arXiv 2103.06561; BAAI-WuDao/BriVL bb8d95b)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from fastvlp.batch import Regions
from fastvlp.data.regions import grid_boxes
from fastvlp.errors import UserError
from fastvlp.model.encoders.interface import ImageEncoderConfig
from fastvlp.model.region_embedding import require_regions

Place = Literal["released", "corners", "exact"]


@dataclass(frozen=True, kw_only=True)
class RegionPool:
    """Options of pooling regions from an image's map of states."""

    samples: int = 4
    """Samples a side of each box; their mean is the region."""
    place: Place = "released"
    """Where the samples lie: in the middle of equal parts of the box (exact), or as in BriVL's code (released, corners)."""
    grid: int | None = None
    """Cells a side of a grid whose cells, and the whole image, are the regions (BriVL 2: 6); None: the batch's boxes."""


def sample_places(low: Tensor, high: Tensor, cells: int, samples: int, place: Place) -> Tensor:
    """Positions of the samples of boxes along an axis -> [... S], in cells from the centre of the first. `low` and `high`, the
    edges of the boxes, are fractions of the image.

    exact: in the middle of S equal parts of the box (RoIAlign, arXiv 1703.06870).
    released: as affine_grid and grid_sample give with align_corners=False and a matrix that was written for True: stretched by
        cells / (cells - 1), away from the edge at 0.
    corners: as with True in both: from edge to edge of the box, half a cell too far.
    """
    step_S = torch.arange(samples, dtype=low.dtype, device=low.device)
    part_S = step_S / max(1, samples - 1) if place == "corners" else (step_S + 0.5) / samples
    at = (low[..., None] + (high - low)[..., None] * part_S) * cells
    if place == "corners":
        return at
    return (at * (cells / max(1, cells - 1)) if place == "released" else at) - 0.5


def box_weights(box_BR4: Tensor, cells: int, config: RegionPool) -> Tensor:
    """Shares [B R N] that the N = cells**2 cells of a square map, row by row, have in each box. Bilinear samples off the map
    are zero.

    The mean of the samples is linear in the map, and its weights are a product of those along each axis. So no sample is held
    in memory, and the backward pass is a matrix product too, the same on every run.
    """
    cell = torch.arange(cells, device=box_BR4.device)
    along_BRW, down_BRH = (
        (1 - (sample_places(low, high, cells, config.samples, config.place)[..., None] - cell).abs()).relu().mean(-2)
        for low, high in zip(box_BR4[..., :2].unbind(-1), box_BR4[..., 2:].unbind(-1))
    )
    return (down_BRH[..., :, None] * along_BRW[..., None, :]).flatten(-2)


def pool_regions(state_BKD: Tensor, weight: Tensor, image: ImageEncoderConfig) -> Tensor:
    """Regions [B R D] of an image's states, by their `box_weights` [B R N], or [R N] for all images.

    Raises UserError if some patches were left out.
    """
    map_BND = state_BKD[:, image.prefix :]
    cells, encoded = image.grid**2, map_BND.shape[1]
    if encoded != cells:
        raise UserError(
            f"regions are pooled from a map of {cells} patches, of which {encoded} were encoded; leave `keep` at 1, or pool "
            "patches without regions (`model.embed.image.regions` None)"
        )
    return weight.to(map_BND.dtype) @ map_BND


class RegionPooling(nn.Module):
    """States of an image to regions of `width`. The released code has a 1x1 convolution and then the mean of the samples; the
    mean and then a linear map is the same, for a sixteenth of the work."""

    grid_RN: Tensor | None

    def __init__(self, config: RegionPool, image: ImageEncoderConfig, width: int):
        super().__init__()
        self.config, self.image = config, image
        self.project = nn.Linear(image.width, width)
        fixed = None if config.grid is None else box_weights(grid_boxes(config.grid), image.grid, config)
        self.register_buffer("grid_RN", fixed, persistent=False)

    def forward(self, state_BKD: Tensor, regions: Regions | None) -> tuple[Tensor, Tensor | None]:
        """Regions [B R width], and which of them are no padding, bool [B R]; None means all."""
        if self.grid_RN is not None:
            return self.project(pool_regions(state_BKD, self.grid_RN, self.image)), None
        regions = require_regions(regions)
        weight_BRN = box_weights(regions.box, self.image.grid, self.config)
        return self.project(pool_regions(state_BKD, weight_BRN, self.image)), regions.mask
