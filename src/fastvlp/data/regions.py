"""Regions of images: objects of the record or a detector's stored regions, moved to where the model sees them, or a grid."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fastvlp.batch import Regions, has_area
from fastvlp.config import Share
from fastvlp.data.records.decode import StoredShape
from fastvlp.data.records.detections import unpack
from fastvlp.data.records.schema import confidences_fault, distribution_fault, list_fault
from fastvlp.data.records.shards import RecordError
from fastvlp.data.records.transform import Transform
from fastvlp.errors import UserError

WHOLE = (0.0, 0.0, 1.0, 1.0)


@dataclass(frozen=True, kw_only=True)
class RegionSource:
    """The regions that are loaded with an image. By default they are the boxes of `info["objects"]`, cut to the part of the
    image that the model sees. Boxes outside of this part are left out."""

    most: int = 36
    """Largest number of regions: the first ones in the order of the record, which detectors list by falling confidence (BriVL
    1.0, arXiv 2103.06561: 36)."""
    whole: bool = False
    """Add the whole image as the last region (BriVL 1.0)."""
    grid: int | None = None
    """Use a grid with this many cells on each side instead of objects, column by column, and then the whole image (BriVL 2:
    6)."""
    classes: tuple[str, ...] | None = None
    """Names of the classes whose probabilities are loaded, in this order. They come from an object's `class_distribution` and
    are scaled to a sum of 1. Without it, the object's `class` has probability 1."""
    empty: Literal["drop", "whole"] = "drop"
    """Treatment of a record without a visible object: drop leaves it out and names it, whole uses the whole image as its
    region."""
    stored: bool = False
    """Use a detector's regions instead of objects. They were imported with the record (`vlp data import --features`), and have
    features and class probabilities."""
    confidence: Share = 0.2
    """For stored regions: use regions with a confidence above this (UNITER, arXiv 1909.11740: 0.2)."""
    least: int = 10
    """For stored regions: use at least this many (UNITER: 10, and `most` 100). If it equals `most`, the number is fixed."""

    def __post_init__(self) -> None:
        if self.most < 1 or (self.grid is not None and self.grid < 1):
            raise UserError(
                f"`regions.most` {self.most}, `regions.grid` {self.grid}: use 1 or more; leave out `regions` for no regions"
            )
        if self.grid is not None and self.classes is not None:
            raise UserError(
                "`regions.classes` are classes of objects, but a grid has no objects; give `regions.grid` or `regions.classes`"
            )
        if self.stored and (self.whole or self.grid is not None or self.classes is not None or self.empty == "whole"):
            raise UserError(
                "`regions.stored` reads a detector's regions, so the options for objects and grids do not apply; leave out "
                "`regions.whole`, `regions.grid`, `regions.classes` and `regions.empty`"
            )
        if self.empty not in ("drop", "whole"):
            raise UserError(f"`regions.empty` {self.empty!r}: choose drop or whole")

    @cached_property
    def column(self) -> dict[str, int]:
        """The position of each class in `classes`."""
        return {name: i for i, name in enumerate(self.classes or ())}

    def count(self, confidences: Sequence[float]) -> int:
        """Returns the number of stored regions that are used, given the confidence of each."""
        confident = sum(confidence > self.confidence for confidence in confidences)
        return min(max(confident, self.least), self.most, len(confidences))


class ImageRegions(NamedTuple):
    """The regions of one image: boxes x0 y0 x1 y1 as fractions of the part of the image that the model sees and, from a
    detector, class probabilities and features."""

    box_R4: Tensor
    classes_RC: Tensor | None = None
    feature_RF: Tensor | None = None


def read_regions(
    source: RegionSource,
    key: str,
    info: Mapping[str, Any],
    shape: StoredShape,
    transform: Transform,
    detected: Sequence[bytes] = (),
    *,
    image: int = 0,
) -> ImageRegions:
    """Returns the regions of one image of a record.

    Args:
        key: key of the record, for errors.
        shape: how this image is stored.
        detected: the npz of each image of the record, for `source.stored`.
        image: the number of the image in the record.

    Raises RecordError if an object is invalid, or if no region is visible (unless `source.empty` is `whole`).
    """
    if source.grid is not None:
        return ImageRegions(grid_boxes(source.grid))
    if source.stored:
        return stored_regions(source, key, info, shape, transform, detected, image)
    if wrong := list_fault(info, "objects"):
        raise RecordError(key, wrong)
    objects = [o for o in info.get("objects", []) if o.get("image", 0) == image]
    box_R4 = torch.tensor([o["box"] for o in objects], dtype=torch.float32).reshape(-1, 4)
    box_R4 = visible_boxes(box_R4, shape, transform)
    visible = has_area(box_R4).nonzero()[: source.most, 0]
    if not len(visible) and source.empty == "drop":
        reason = f"none of its {len(objects)} objects is in the picture"
        raise RecordError(key, f"{reason} (set `regions.empty` to `whole` to keep such records)")
    whole = [WHOLE] if source.whole or not len(visible) else []
    box_R4 = torch.cat([box_R4[visible], torch.tensor(whole).reshape(-1, 4)])
    if source.classes is None:
        return ImageRegions(box_R4)
    shares = class_shares(key, [objects[i] for i in visible.tolist()], source.column)
    return ImageRegions(box_R4, torch.cat([shares, torch.zeros(len(whole), len(source.classes))]))


def stored_regions(
    source: RegionSource,
    key: str,
    info: Mapping[str, Any],
    shape: StoredShape,
    transform: Transform,
    detected: Sequence[bytes],
    image: int,
) -> ImageRegions:
    """Returns the detector's most confident regions, without those that are outside of a crop."""
    if len(detected) <= image:
        raise RecordError(key, "no detector's regions are stored with it (`vlp data import --features`)")
    confidences = info.get("confidences", [])
    if wrong := confidences_fault(confidences):
        raise RecordError(key, wrong)
    try:
        regions = unpack(detected[image])
    except ValueError as error:
        raise RecordError(key, f"its stored regions: {error}") from None
    if len(confidences) <= image or len(confidences[image]) != len(regions.box_R4):
        raise RecordError(key, f"{len(regions.box_R4)} regions are stored, but not the same number of confidences")
    n = source.count(confidences[image])
    box_R4 = torch.from_numpy(regions.box_R4[:n]) * torch.tensor([shape.width, shape.height] * 2)
    box_R4 = visible_boxes(box_R4, shape, transform)
    visible = has_area(box_R4)
    if not visible.any():
        raise RecordError(key, f"none of its {n} stored regions is in the picture")
    classes = None if regions.classes_RC is None else torch.from_numpy(regions.classes_RC[:n])[visible]
    return ImageRegions(box_R4[visible], classes, torch.from_numpy(regions.feature_RF[:n])[visible])


def visible_boxes(box_R4: Tensor, shape: StoredShape, transform: Transform) -> Tensor:
    """Boxes in pixels of the stored image as fractions of the square that the model sees, cut at its edges. A box of which
    nothing is visible has no area."""
    return transform.boxes(*upright(box_R4, shape)).clamp(0, 1)


def upright(box_R4: Tensor, shape: StoredShape) -> tuple[Tensor, int, int]:
    """Boxes in stored pixels, turned as EXIF turns the image, and the turned image's height and width."""
    height, width, orientation = shape
    if orientation in (5, 6, 7, 8):
        box_R4, height, width = box_R4[:, [1, 0, 3, 2]], width, height
    x0, y0, x1, y1 = box_R4.unbind(1)
    if orientation in (2, 3, 6, 7):
        x0, x1 = width - x1, width - x0
    if orientation in (3, 4, 7, 8):
        y0, y1 = height - y1, height - y0
    return torch.stack([x0, y0, x1, y1], 1), height, width


def class_shares(key: str, objects: Sequence[Mapping[str, Any]], column: Mapping[str, int]) -> Tensor:
    """Shares of the named classes, float32 [R C]; zeros for an object of another class."""
    shares_RC = np.zeros((len(objects), len(column)), np.float32)
    for row, item in zip(shares_RC, objects):
        shares = item.get("class_distribution", {str(item["class"]): 1.0})
        if wrong := distribution_fault(shares):
            raise RecordError(key, f"field objects: {wrong}")
        for name in shares.keys() & column.keys():
            row[column[name]] = shares[name]
    return torch.from_numpy(shares_RC / np.maximum(shares_RC.sum(1, keepdims=True), 1e-9))


@lru_cache
def grid_boxes(side: int) -> Tensor:
    """Cells of a grid, then the whole image, [side*side + 1, 4]. The outer loop is over x, as in BriVL 2's released code."""
    cells = [(x / side, y / side, (x + 1) / side, (y + 1) / side) for x in range(side) for y in range(side)]
    # Not on the default device, since it is kept: a model that is loaded is first made on the meta device, then on the CPU.
    return torch.tensor([*cells, WHOLE], device="cpu")


def region_count(source: RegionSource | None, info: Mapping[str, Any]) -> int:
    """Returns the number of regions of a record, including regions outside of the picture, which are left out later."""
    if source is None:
        return 0
    if source.grid is not None:
        return source.grid**2 + 1
    if source.stored:
        return 0 if confidences_fault(info.get("confidences")) else source.count(info["confidences"][0])
    items = info.get("objects")
    objects = [o for o in items if isinstance(o, dict) and o.get("image", 0) == 0] if isinstance(items, list) else []
    return max(1, min(len(objects), source.most) + source.whole)


def pad_regions(images: Sequence[ImageRegions]) -> Regions:
    """The regions of a batch, one image a row. Raises UserError if their features or shares differ in width."""
    return Regions(
        box=pad_sequence([regions.box_R4 for regions in images], batch_first=True),
        count=torch.tensor([len(regions.box_R4) for regions in images]),
        feature=_padded([regions.feature_RF for regions in images], images, "features"),
        classes=_padded([regions.classes_RC for regions in images], images, "shares of classes"),
    )


def _padded(parts: Sequence[Tensor | None], images: Sequence[ImageRegions], name: str) -> Tensor | None:
    """[B R F], zeros for an image without any; None if no image has any."""
    widths = sorted({part.shape[1] for part in parts if part is not None})
    if not widths:
        return None
    if len(widths) > 1:
        raise UserError(
            f"regions' {name} of one batch are {widths} dimensions wide; import the regions of a single detector"
        )
    (some, *_) = (part for part in parts if part is not None)
    full = [
        some.new_zeros(len(regions.box_R4), *widths) if part is None else part for part, regions in zip(parts, images)
    ]
    return pad_sequence(full, batch_first=True)
