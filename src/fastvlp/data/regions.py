"""Which parts of an image travel with it: the record's objects or a detector's regions, moved to where the model sees
them, or a fixed grid."""

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
from fastvlp.data.records.decode import Stored
from fastvlp.data.records.detections import unpack
from fastvlp.data.records.schema import confidences_fault, distribution_fault, list_fault
from fastvlp.data.records.shards import RecordError
from fastvlp.data.records.transform import Transform
from fastvlp.errors import UserError

WHOLE = (0.0, 0.0, 1.0, 1.0)


@dataclass(frozen=True, kw_only=True)
class RegionSource:
    """Boxes of `info["objects"]`, cut to what the model sees; those of which nothing is seen are left out.

    most: the first so many, as listed: detectors list by falling confidence (BriVL 1.0: 36, spec B1.3).
    whole: the whole image comes last, as one more region (BriVL 1.0).
    grid: instead of objects, so many cells a side, column by column, then the whole image (BriVL 2: 6).
    classes: names of the classes whose shares travel along, in this order: those of an object's `class_distribution`,
        scaled to a sum of 1, or all for its `class` where it has none.
    empty: a record of which no object is left is dropped by name, or shown `whole`.
    stored: instead of objects, the detector's regions that were imported with the record (`vlp data import --features`),
        with their features and shares of classes: of those by falling confidence as many as have one above
        `confidence`, yet no fewer than `least` and no more than `most` (UNITER: 0.2, 10 and 100). A fixed number: least
        equal to most.
    """

    most: int = 36
    whole: bool = False
    grid: int | None = None
    classes: tuple[str, ...] | None = None
    empty: Literal["drop", "whole"] = "drop"
    stored: bool = False
    confidence: float = 0.2
    least: int = 10

    def __post_init__(self) -> None:
        if self.most < 1 or (self.grid is not None and self.grid < 1):
            raise UserError(f"regions.most {self.most}, regions.grid {self.grid}: use 1 or more, or no regions")
        if self.grid is not None and self.classes is not None:
            raise UserError(
                "regions.classes are of objects, and a grid shows none: give regions.grid or regions.classes"
            )
        if self.stored and (self.whole or self.grid is not None or self.classes is not None or self.empty == "whole"):
            raise UserError(
                "regions.stored brings what a detector found, which tells neither of a grid nor of the whole image, with "
                "classes of its own: leave out regions.whole, grid, classes and empty"
            )
        if self.empty not in ("drop", "whole"):
            raise UserError(f"regions.empty {self.empty!r}: choose drop or whole")

    @cached_property
    def column(self) -> dict[str, int]:
        return {name: i for i, name in enumerate(self.classes or ())}

    def count(self, confidences: Sequence[float]) -> int:
        """Of the stored regions, how many come along."""
        sure = sum(confidence > self.confidence for confidence in confidences)
        return min(max(sure, self.least), self.most, len(confidences))


class Found(NamedTuple):
    """The regions of one image, as in `Regions`."""

    box_R4: Tensor
    classes_RC: Tensor | None = None
    feature_RF: Tensor | None = None


def read_regions(
    source: RegionSource,
    key: str,
    info: Mapping[str, Any],
    stored: Stored,
    transform: Transform,
    detected: Sequence[bytes] = (),
    *,
    image: int = 0,
) -> Found:
    """Of one of the record's images; `stored` is how that one lies. `detected`: of the record.

    Raises RecordError where an object is at fault, and where none is seen (unless the source shows the whole)."""
    if source.grid is not None:
        return Found(grid_boxes(source.grid))
    if source.stored:
        return stored_regions(source, key, info, stored, transform, detected, image)
    if wrong := list_fault(info, "objects"):
        raise RecordError(key, wrong)
    objects = [o for o in info.get("objects", []) if o.get("image", 0) == image]
    box_R4 = torch.tensor([o["box"] for o in objects], dtype=torch.float32).reshape(-1, 4)
    box_R4 = transform.boxes(*upright(box_R4, stored)).clamp(0, 1)
    seen = has_area(box_R4).nonzero()[: source.most, 0]
    if not len(seen) and source.empty == "drop":
        reason = f"none of its {len(objects)} objects is in the picture"
        raise RecordError(key, f"{reason} (set regions.empty to 'whole' to keep such records)")
    whole = [WHOLE] if source.whole or not len(seen) else []
    box_R4 = torch.cat([box_R4[seen], torch.tensor(whole).reshape(-1, 4)])
    if source.classes is None:
        return Found(box_R4)
    shares = class_shares(key, [objects[i] for i in seen.tolist()], source.column)
    return Found(box_R4, torch.cat([shares, torch.zeros(len(whole), len(source.classes))]))


def stored_regions(
    source: RegionSource,
    key: str,
    info: Mapping[str, Any],
    stored: Stored,
    transform: Transform,
    detected: Sequence[bytes],
    image: int,
) -> Found:
    """The most confident regions that a detector found, but for those that a crop leaves out."""
    if len(detected) <= image:
        raise RecordError(key, "no detector's regions are stored with it (`vlp data import --features`)")
    told = info.get("confidences", [])
    if wrong := confidences_fault(told):
        raise RecordError(key, wrong)
    try:
        found = unpack(detected[image])
    except ValueError as error:
        raise RecordError(key, f"its stored regions: {error}") from None
    if len(told) <= image or len(told[image]) != len(found.box_R4):
        raise RecordError(key, f"{len(found.box_R4)} regions are stored, and confidences are not as many")
    n = source.count(told[image])
    box_R4 = torch.from_numpy(found.box_R4[:n]) * torch.tensor([stored.width, stored.height] * 2)
    box_R4 = transform.boxes(*upright(box_R4, stored)).clamp(0, 1)
    seen = has_area(box_R4)
    if not seen.any():
        raise RecordError(key, f"none of its {n} stored regions is in the picture")
    classes = None if found.classes_RC is None else torch.from_numpy(found.classes_RC[:n])[seen]
    return Found(box_R4[seen], classes, torch.from_numpy(found.feature_RF[:n])[seen])


def upright(box_R4: Tensor, stored: Stored) -> tuple[Tensor, int, int]:
    """Boxes in stored pixels where EXIF turns the image, and the turned image's height and width."""
    height, width, turn = stored
    if turn in (5, 6, 7, 8):
        box_R4, height, width = box_R4[:, [1, 0, 3, 2]], width, height
    x0, y0, x1, y1 = box_R4.unbind(1)
    if turn in (2, 3, 6, 7):
        x0, x1 = width - x1, width - x0
    if turn in (3, 4, 7, 8):
        y0, y1 = height - y1, height - y0
    return torch.stack([x0, y0, x1, y1], 1), height, width


def class_shares(key: str, objects: Sequence[Mapping[str, Any]], column: Mapping[str, int]) -> Tensor:
    """float32 [R C]; zeros for an object of no named class."""
    shares_RC = np.zeros((len(objects), len(column)), np.float32)
    for row, told in zip(shares_RC, objects):
        shares = told.get("class_distribution", {str(told["class"]): 1.0})
        if wrong := distribution_fault(shares):
            raise RecordError(key, f"field objects: {wrong}")
        for name in shares.keys() & column.keys():
            row[column[name]] = shares[name]
    return torch.from_numpy(shares_RC / np.maximum(shares_RC.sum(1, keepdims=True), 1e-9))


@lru_cache
def grid_boxes(side: int) -> Tensor:
    """[side*side + 1, 4]: x is the outer loop (BriVL 2), the whole image comes last."""
    cells = [(x / side, y / side, (x + 1) / side, (y + 1) / side) for x in range(side) for y in range(side)]
    return torch.tensor([*cells, WHOLE])


def pad_regions(found: Sequence[Found]) -> Regions:
    """The regions of a batch, one image a row."""
    return Regions(
        box=pad_sequence([part.box_R4 for part in found], batch_first=True),
        count=torch.tensor([len(part.box_R4) for part in found]),
        feature=_padded([part.feature_RF for part in found], found, "features"),
        classes=_padded([part.classes_RC for part in found], found, "shares of classes"),
    )


def _padded(parts: Sequence[Tensor | None], found: Sequence[Found], what: str) -> Tensor | None:
    """[B R F], zeros for an image that has none; None where no image has any."""
    widths = sorted({part.shape[1] for part in parts if part is not None})
    if not widths:
        return None
    if len(widths) > 1:
        raise UserError(f"regions' {what} of one batch are {widths} numbers wide: import what one detector found")
    (some, *_) = (part for part in parts if part is not None)
    full = [some.new_zeros(len(f.box_R4), *widths) if part is None else part for part, f in zip(parts, found)]
    return pad_sequence(full, batch_first=True)
