"""What travels: Record (stored), Example (decoded), Batch (on the device).

Dimension key used all over the code: B pairs, L text tokens, N patches, K kept patches, R regions, D width, E embedding,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree


@dataclass(frozen=True, kw_only=True)
class Record:
    """One record as a source yields it and a shard stores it: images still encoded, everything else JSON, but for a
    detector's regions: `detected` has the npz of each image, or nothing (`data/detected.py`).

    `info` keys that the library reads (all optional): `captions` and `captions_zh` (lists of str), `objects` (list of
    {class, box [x0,y0,x1,y1] in pixels, ...}, maybe with `class_distribution`: {class: share} and, of a pair of images,
    `image`: 0 or 1), `questions` (list of {question, answers: {answer: score in 0..1}, kind}), `statements` (list of
    {text, label: bool}; about the record's one or two images), `expressions` (list of {text, object: place in objects}),
    `entailments` (list of {text, label: "contradiction", "entailment" or "neutral"}), `choices` (list of {question,
    answers: list of str, right: place in it}, maybe with `rationales` and `right_rationale`), `label` (a class name),
    `confidences` (of each image a list with the detector's confidence in each region, falling).
    Any other key travels along untouched.
    """

    key: str
    images: tuple[bytes, ...]
    info: Mapping[str, Any]
    detected: tuple[bytes, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Example:
    """A decoded record: `images` is uint8 [I 3 H W], I the record's number of images (1, or 2 for pairs)."""

    key: str
    images: Tensor
    info: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Dropped:
    """A record that could not be used, by name, with the reason; counted and reported, never replaced."""

    key: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Regions:
    """Parts of each image: a detector's boxes or a grid, padded with zeros to the most of this batch.

    box:     float32 [B R 4], x0 y0 x1 y1 as fractions of the image that the model sees. A box of no area is no region:
             padding, or one that a crop has left behind (`augment`).
    count:   int64 [B], regions of each row before any crop; they come first.
    feature: float [B R F], a detector's features; None where regions are pooled from the image itself.
    classes: float [B R C], a detector's shares of C classes, which sum to 1; zeros where nothing is told of a region; None
             where it is of no region of the batch.
    """

    box: Tensor
    count: Tensor
    feature: Tensor | None = None
    classes: Tensor | None = None

    @property
    def mask(self) -> Tensor:
        """Which are regions: bool [B R]."""
        listed = torch.arange(self.box.shape[1], device=self.box.device) < self.count[:, None]
        return listed & has_area(self.box)


def has_area(box: Tensor) -> Tensor:
    """Whether a box x0 y0 x1 y1 [... 4] holds anything: bool [...]."""
    return (box[..., 2:] > box[..., :2]).all(-1)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Clean rows, the same for every objective: corruption happens on the device, as a function of `seed`.

    image:  uint8 [B 3 H W], normalised on the device (a float tensor is taken as already normalised).
    ids:    int64 [B L], `<s> words </s>` padded on the right to the longest of this batch only.
    length: int64 [B], real tokens of each row, `<s>` and `</s>` included; no attention mask travels.
    seed:   int64 [B], one random number a row: all that is drawn for the row is a hash of it, so that masks do not
            depend on batch size, padding, rank or device.
    slot:   int64 [B] or None: which image of a pair a row shows (NLVR2: 0 or 1); None means 0.
    target: what a task's rows are scored against (float [B A] or int64 [B]); None in pretraining.
    regions: of each image, where the data brings them (`RegionSource`).
    plain: the images before training augmented them, for objectives that draw views of their own; None: `image` is it.
    """

    image: Tensor
    ids: Tensor
    length: Tensor
    seed: Tensor
    slot: Tensor | None = None
    target: Tensor | None = None
    regions: Regions | None = None
    plain: Tensor | None = None

    def to(self, device: torch.device | str, non_blocking: bool = True) -> Batch:
        return _pytree.tree_map_only(Tensor, lambda t: t.to(device, non_blocking=non_blocking), self)

    def __len__(self) -> int:
        return self.image.shape[0]


def register_dataclass_node(cls: type) -> None:
    """Makes `cls` a pytree node. DDP and compile look for tensors with pytree; unregistered values are skipped silently."""
    names = [f.name for f in fields(cls)]
    _pytree.register_pytree_node(
        cls,
        lambda value: ([getattr(value, name) for name in names], None),
        lambda leaves, _: cls(**dict(zip(names, leaves))),
        serialized_type_name=f"{cls.__module__}.{cls.__qualname__}",
    )


register_dataclass_node(Regions)
register_dataclass_node(Batch)
