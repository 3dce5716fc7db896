"""The forms of data on its way to the model: Record (stored), Example (decoded), Batch (on the device).

Dimension key used all over the code: B pairs, L text tokens, N patches, K kept patches, R regions, D width, E embedding,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree


@dataclass(frozen=True, kw_only=True)
class Record:
    """One record as a source yields it and a shard stores it.

    Attributes:
        key: unique name.
        images: encoded images, one or more.
        info: everything else, as JSON. The library reads these keys, all optional, and keeps any other:
            captions, captions_zh: lists of str.
            objects: list of {class, box: [x0, y0, x1, y1] in pixels}, optionally with `class_distribution`, {class: share},
                and `image`, the number of its image in the record.
            questions: list of {question, answers: {answer: score from 0 to 1}}, optionally with `kind`.
            statements: list of {text, label: bool} about the record's one or two images.
            expressions: list of {text, object: place in `objects`}.
            entailments: list of {text, label: "contradiction", "entailment" or "neutral"}.
            choices: list of {question, answers: list of str, right: place in it}, each maybe with `rationales` and
                `right_rationale`.
            label: name of a class.
            confidences: for each image the detector's confidence in each region, falling.
        detected: the npz with a detector's regions of each image (`data/records/detections.py`), or nothing.
        file: path of its first image in a source; a shard does not store it.
    """

    key: str
    images: tuple[bytes, ...]
    info: Mapping[str, Any]
    detected: tuple[bytes, ...] = ()
    file: str = field(default="", compare=False)


@dataclass(frozen=True, kw_only=True)
class Example:
    """A decoded record. `images`: uint8 [I 3 H W], where I is 1, or 2 for pairs of images."""

    key: str
    images: Tensor
    info: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Dropped:
    """The name of a record that cannot be used, and the reason. Such records are counted and reported, never replaced.

    Attributes:
        key: of the record, or the line that it is in, as `pairs.csv:7`.
        file: path of its first image in a source, where it has one.
    """

    key: str
    reason: str
    file: str = field(default="", compare=False)


@dataclass(frozen=True, kw_only=True)
class Regions:
    """Regions of each image: objects, a detector's boxes or a grid, padded with zeros to the largest number of the batch.

    Attributes:
        box: float32 [B R 4], x0 y0 x1 y1 as fractions of the image that the model sees. A box without area is no region: it
            is padding, or a crop has cut it off (`augment`).
        count: int64 [B], regions of each row before any crop; they come before the padding.
        feature: float [B R F], a detector's features; None if regions are pooled from the image itself.
        classes: float [B R C], a detector's shares of C classes, which sum to 1; zeros for a region without shares; None
            where no region of the batch has any.
    """

    box: Tensor
    count: Tensor
    feature: Tensor | None = None
    classes: Tensor | None = None

    @property
    def mask(self) -> Tensor:
        """Whether a box is a region: bool [B R]."""
        listed = torch.arange(self.box.shape[1], device=self.box.device) < self.count[:, None]
        return listed & has_area(self.box)


def has_area(box: Tensor) -> Tensor:
    """Whether boxes x0 y0 x1 y1 [... 4] have an area: bool [...]."""
    return (box[..., 2:] > box[..., :2]).all(-1)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """A batch of images and texts. It is the same for every objective, which masks or corrupts its inputs on the device.

    Attributes:
        image: images, uint8 [B 3 H W], which are normalised on the device; a float tensor counts as already normalised. Or
            stored states of the images [B S D] from a frozen encoder (`data/state_store.py`).
        ids: token ids, int64 [B L]: `<s> words </s>`, padded on the right to the longest text of the batch.
        length: number of tokens of each row without padding, int64 [B], including `<s>` and `</s>`. It replaces an attention
            mask.
        seed: a random number for each row, int64 [B]. All random draws for a row are hashes of it, so that they do not depend
            on batch size, padding, rank or device.
        slot: the number of the image in its pair, int64 [B] (NLVR2: 0 or 1); None means 0.
        target: the right answers of a task's rows, float [B A] or int64 [B]; None in pretraining.
        regions: regions of each image, if the data have regions (`RegionSource`).
        text: stored states of the texts [B S D] from a frozen text encoder; None: the texts are encoded from `ids`.
        plain: the images before augmentation, for objectives that draw their own views; None if `image` is not augmented.
        content: hashes of each row's text and image, int64 [B 2] (`objectives/equal_pairs.py`); None if they were not computed
            yet.
        teacher_image, teacher_text: float [B E], stored vectors of each row's image and text by a teacher; None without one.
    """

    image: Tensor
    ids: Tensor
    length: Tensor
    seed: Tensor
    slot: Tensor | None = None
    target: Tensor | None = None
    regions: Regions | None = None
    plain: Tensor | None = None
    text: Tensor | None = None
    content: Tensor | None = None
    teacher_image: Tensor | None = None
    teacher_text: Tensor | None = None

    def to(self, device: torch.device | str, non_blocking: bool = True) -> Batch:
        return _pytree.tree_map_only(Tensor, lambda t: t.to(device, non_blocking=non_blocking), self)

    def __len__(self) -> int:
        return self.image.shape[0]


def register_dataclass_node(cls: type) -> None:
    """Makes the dataclass a pytree node. DDP and compile find tensors by pytree, and skip unregistered classes silently."""
    names = [f.name for f in fields(cls)]
    _pytree.register_pytree_node(
        cls,
        lambda value: ([getattr(value, name) for name in names], None),
        lambda leaves, _: cls(**dict(zip(names, leaves))),
        serialized_type_name=f"{cls.__module__}.{cls.__qualname__}",
    )


register_dataclass_node(Regions)
register_dataclass_node(Batch)
