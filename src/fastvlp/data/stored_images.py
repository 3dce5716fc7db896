"""The states of images by a frozen encoder: of every image of a split, computed once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Literal

import torch
from torch import Tensor

from fastvlp.data.reader import RecordReader
from fastvlp.data.records.interface import Records
from fastvlp.data.records.shards import RecordError
from fastvlp.data.records.transform import Transform
from fastvlp.data.state_store import Computed, StateStore
from fastvlp.data.states_file import EntryShape, StatesFile
from fastvlp.data.streams import in_threads

# Images that are encoded at a time.
ROWS = 64


@dataclass(frozen=True, kw_only=True)
class ImageStore:
    """The store of the states of images.

    Attributes:
        store: opens files of states.
        encode: uint8 [B 3 H W] on the CPU -> states [B S D] on the CPU.
        states: S, of an image.
        flip: share of the images that training mirrors, whose states are stored too.
    """

    store: StateStore
    encode: Callable[[Tensor], Tensor]
    states: int
    flip: float = 0.0

    def open(
        self,
        shards: Records,
        transform: Transform,
        images: int | Literal["first"] = "first",
        mirrored: bool = False,
    ) -> StatesFile | None:
        """The states of the images of each record that are used, or of the mirrored images: entry i * n + k is image k of
        record i. None if they are not stored."""
        number = 1 if images == "first" else images
        reader = RecordReader(shards, transform, images="first" if number == 1 else number)

        def read(i: int) -> list[Computed]:
            record = reader.record(i)
            try:
                parts = zip(record.images, record.shapes)
                return [Computed(i * number + k, image, shape) for k, (image, shape) in enumerate(parts)]
            except RecordError:
                return []

        def compute(entries: Sequence[int]) -> Iterator[Computed]:
            wanted = {*entries}
            records = sorted({entry // number for entry in entries})
            wanted_images = (one for part in in_threads(read, records) for one in part if one.entry in wanted)
            while rows := [*islice(wanted_images, ROWS)]:
                pixels = torch.stack([one.states for one in rows])
                states = self.encode(pixels.flip(-1) if mirrored else pixels)
                yield from (one._replace(states=own) for one, own in zip(rows, states))

        about = {"transform": asdict(transform), "images": number, **({"mirrored": True} if mirrored else {})}
        return self.store.open(shards, about, lambda: EntryShape([self.states] * (number * len(shards))), compute)
