"""Reads a split for an evaluation: every record, in order. An evaluation leaves no record out, so an unreadable record is an
error."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree

from fastvlp.batch import Dropped, Regions
from fastvlp.data.prefetch import Prefetch
from fastvlp.data.reader import RecordReader, refusal
from fastvlp.data.records.interface import Records
from fastvlp.data.records.schema import usable_captions
from fastvlp.data.records.shards import RecordError, Shards
from fastvlp.data.records.transform import Transform
from fastvlp.data.regions import ImageRegions, pad_regions
from fastvlp.data.splits import is_folder, place_in
from fastvlp.data.state_store import say
from fastvlp.data.streams import in_threads, with_progress
from fastvlp.errors import UserError
from fastvlp.eval.encoding import LoadedModel
from fastvlp.model.frozen_states import ImageUse, image_store


class Images(NamedTuple):
    """Images, uint8 [B 3 H W] or their stored states [B S D], and their regions if the model reads boxes."""

    image: Tensor
    regions: Regions | None

    def to(self, device: torch.device) -> Images:
        return _pytree.tree_map_only(Tensor, lambda x: x.to(device), self)


def open_split(data: str, split: str) -> Shards:
    """The shards in the folder `split` of `data`; if there is no such folder, those in `data` itself, with a line on stderr
    that says so."""
    place = place_in(data, split)
    if is_folder(place):
        return Shards(place)
    try:
        shards = Shards(data)
    except UserError as error:
        raise UserError(f"`split` {split}: the data has no folder of this name; {error}") from error
    say_itself(data, split)
    return shards


def say_itself(data: str, split: str) -> None:
    """Says on stderr that `data` is read itself, unless it is called like the split."""
    name = data.rstrip("/").rpartition("/")[2]
    if name != split:
        say(f"{data}: has no folder {split}; what it holds itself is read")


def image_batches(
    shards: Records,
    loaded: LoadedModel,
    description: str = "images",
    use: ImageUse = "states",
    mirrored: bool = False,
) -> Iterator[tuple[slice, Images]]:
    """The first image of every record, in order; decoded on all CPU cores, ahead of their use. `use`: what is read of them;
    the states of an encoder that training kept as it was are stored, and then read in place of pixels.

    Yields the range of records of each batch, and their images, mirrored or not. Raises UserError for an image that cannot be
    read, and where images with boxes are to be mirrored.
    """
    config = loaded.model.config
    transform = Transform(size=config.image.size, mode=loaded.fit)
    source = loaded.regions if config.embed is not None and config.embed.reads_boxes else None
    if mirrored and source is not None:
        raise UserError("images cannot be mirrored where boxes are read; leave out `mirror`")
    states = None
    if loaded.states is not None and use != "pixels":
        store = image_store(loaded.model, loaded.states, precision=loaded.precision, use=use)
        states = store.open(shards, transform, mirrored=mirrored)
    records = RecordReader(shards, transform, regions=source, states=states, strict=True)

    def read(i: int) -> tuple[Tensor, list[ImageRegions]] | Dropped:
        record = records.record(i)
        try:
            return record.images[0], record.regions
        except RecordError as error:
            return error.dropped

    def batches() -> Iterator[tuple[slice, Images]]:
        read_all = in_threads(read, range(len(shards)))
        rows = with_progress(read_all, lambda: len(shards), description, loaded.show)
        for first in range(0, len(shards), loaded.batch_size):
            part = list(islice(rows, loaded.batch_size))
            if dropped := [row for row in part if isinstance(row, Dropped)]:
                raise refusal(shards, dropped)
            images, regions = zip(*(row for row in part if not isinstance(row, Dropped)))
            padded = None if source is None else pad_regions([one for own in regions for one in own])
            image = torch.stack(images)
            image = image.flip(-1) if mirrored and states is None else image
            yield slice(first, first + len(part)), Images(image, padded)

    return Prefetch(batches())


def read_captions(shards: Records, field: str) -> list[list[str]]:
    """Returns all captions of each record. Raises UserError if a record has none."""
    captions_of = [usable_captions(info, field) for info in _infos(shards)]
    without = [shards.key(i) for i, captions in enumerate(captions_of) if not captions]
    if without:
        raise UserError(
            f"{shards.url}: {len(without)} records have no caption in {field!r} ({', '.join(without[:3])}), and an "
            f"evaluation leaves none out; remove them, or name another field with `captions`"
        )
    return captions_of


def read_labels(shards: Records, field: str) -> list[str]:
    """The class of each record. Raises UserError if a record has none."""
    labels = []
    for i, info in enumerate(_infos(shards)):
        label = info.get(field)
        if not isinstance(label, str | int | float) or label == "":
            fields = ", ".join(sorted(info)) or "none"
            raise UserError(
                f"{shards.url}: {shards.key(i)} has no class in {field!r} (its fields: {fields}); "
                f"name the field with `label`"
            )
        labels.append(str(label))
    return labels


def _infos(shards: Records) -> Iterator[dict[str, Any]]:
    for i in range(len(shards)):
        try:
            yield shards.info(i)
        except RecordError as error:
            raise refusal(shards, [error.dropped]) from error
