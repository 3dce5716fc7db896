"""Regions of an image pooled from the map of its patch states (BriVL: arXiv 2103.06561; BAAI-WuDao/BriVL bb8d95b)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from fastvlp.batch import Regions
from fastvlp.data.regions import grid_boxes
from fastvlp.errors import UserError
from fastvlp.model.encoders.interface import ImageEncoderConfig
from fastvlp.model.region_embedding import given

Place = Literal["released", "corners", "exact"]


@dataclass(frozen=True, kw_only=True)
class RegionPool:
    """samples: of the map, a side of each box; their mean is the region. place: where they lie (`sample_places`). grid: so
    many cells a side, then the whole image, are the regions, whatever boxes travel (BriVL 2: 6); None: the batch's boxes."""

    samples: int = 4
    place: Place = "released"
    grid: int | None = None


def sample_places(low: Tensor, high: Tensor, cells: int, samples: int, place: Place) -> Tensor:
    """Where the samples of boxes lie along an axis -> [... S], in cells from the centre of the first. `low` and `high` are
    fractions of the image.

    exact: in the middle of S equal parts of the box (RoIAlign, arXiv 1703.06870).
    released: affine_grid and grid_sample with align_corners=False, but with a matrix that was written for True, which
        stretches everything by cells / (cells - 1), away from the edge at 0.
    corners: with True in both: from edge to edge of the box, half a cell too far.
    """
    step_S = torch.arange(samples, device=low.device)
    part_S = step_S / max(1, samples - 1) if place == "corners" else (step_S + 0.5) / samples
    at = (low[..., None] + (high - low)[..., None] * part_S) * cells
    if place == "corners":
        return at
    return (at * (cells / max(1, cells - 1)) if place == "released" else at) - 0.5


def box_weights(box_BR4: Tensor, cells: int, config: RegionPool) -> Tensor:
    """Shares [B R N] of a square map's N = cells**2 cells, row by row, in each box. Bilinear samples off the map are zero.

    Their mean is linear in the map, and its weights are a product of one axis's and the other's: no sample is ever held,
    and the backward pass is a matrix product too, the same on every run.
    """
    cell = torch.arange(cells, device=box_BR4.device)
    along_BRW, down_BRH = (
        (1 - (sample_places(low, high, cells, config.samples, config.place)[..., None] - cell).abs()).relu().mean(-2)
        for low, high in zip(box_BR4[..., :2].unbind(-1), box_BR4[..., 2:].unbind(-1))
    )
    return (down_BRH[..., :, None] * along_BRW[..., None, :]).flatten(-2)


def pooled(state_BKD: Tensor, weight: Tensor, image: ImageEncoderConfig) -> Tensor:
    """Regions by their `box_weights`, [B R N] or [R N] for all images -> [B R D]."""
    patches_BND = state_BKD[:, image.prefix :]
    cells, found = image.grid, patches_BND.shape[1]
    if found != cells**2:
        raise UserError(
            f"regions are pooled from a map of {cells**2} patches, of which {found} were encoded; leave keep at 1, or "
            f"pool patches without regions (model.embed.image.regions None)"
        )
    return weight.to(patches_BND.dtype) @ patches_BND


class RegionPooling(nn.Module):
    """Patch states to regions of `width`. A 1x1 convolution and then a mean over samples is the same as this order: the mean
    and then a linear map, for a sixteenth of the work."""

    grid_RN: Tensor | None

    def __init__(self, config: RegionPool, image: ImageEncoderConfig, width: int):
        super().__init__()
        self.config, self.image = config, image
        self.project = nn.Linear(image.width, width)
        fixed = None if config.grid is None else box_weights(grid_boxes(config.grid), image.grid, config)
        self.register_buffer("grid_RN", fixed, persistent=False)

    def forward(self, state_BKD: Tensor, regions: Regions | None) -> tuple[Tensor, Tensor | None]:
        """[B R width], and which of them are regions, bool [B R]; None: all."""
        if self.grid_RN is not None:
            return self.project(pooled(state_BKD, self.grid_RN, self.image)), None
        regions = given(regions)
        weight_BRN = box_weights(regions.box, self.image.grid, self.config)
        return self.project(pooled(state_BKD, weight_BRN, self.image)), regions.mask
