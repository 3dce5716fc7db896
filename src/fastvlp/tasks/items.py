"""Items: texts about records, each with its right answer; and batches of items with the images of their records."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fastvlp.batch import Batch, Dropped, has_area
from fastvlp.data.batching import Lengths
from fastvlp.data.loader import Loader, Row
from fastvlp.data.reader import RecordReader
from fastvlp.data.records.schema import clean_text
from fastvlp.data.records.shards import RecordError, Shards
from fastvlp.data.records.transform import Transform
from fastvlp.data.regions import ImageRegions, RegionSource, pad_regions, region_count
from fastvlp.data.states_file import StatesFile
from fastvlp.data.tokenize import Tokenizer
from fastvlp.errors import UserError
from fastvlp.random import hash64

# Describes the fault of a value in a record; None if it has no fault.
Check = Callable[[Any], str | None]


class Item(NamedTuple):
    """A text about the images of a record.

    Attributes:
        record: index of the record in its shards.
        text: the text; empty if the entry cannot be used, and then `fault` says why.
        entry: the entry of the record's info that the text is from, with its right answer (answers, label, ...).
        fault: why the entry cannot be used.
        following: texts that come after `text` in the same row, such as an answer after its question.
        box: the part of the image that the text is about: x0 y0 x1 y1 in pixels of the first stored image and, in a batch,
            as fractions of the image that the model sees.
    """

    record: int
    text: str
    entry: Mapping[str, Any]
    fault: str = ""
    following: tuple[str, ...] = ()
    box: tuple[float, ...] | None = None


class ItemImages(NamedTuple):
    """An item with the images of its record as the model sees them, and with their regions if the model reads regions."""

    item: Item
    images: list[Tensor]
    regions: list[ImageRegions]


def read_items(shards: Shards, field: str, text: str, answer: str, check: Check | None = None) -> list[Item]:
    """Reads every entry of `info[field]` of every record. `entry[text]` is its text, and `entry[answer]` its right answer,
    whose faults `check` describes.

    A record whose info cannot be read, and an entry that lacks one of the two or has a fault, becomes an item without text.
    It is dropped, or refused, when a batch with it is made. Raises UserError if no record has a usable entry.
    """
    items: list[Item] = []
    fields: set[str] = set()
    for i in range(len(shards)):
        try:
            info = shards.info(i)
        except RecordError:
            items.append(Item(i, "", {}))
            continue
        fields.update(info)
        entries = info.get(field) or []
        if not isinstance(entries, list):
            items.append(Item(i, "", {}, f"field {field} is not a list"))
            continue
        items += [_item(i, entry, field, text, answer, check) for entry in entries]
    if not any(item.text for item in items):
        faults = "".join(f"; {shards.key(item.record)}: {item.fault}" for item in items[:3] if item.fault)
        raise UserError(
            f"{shards.url}: no record has {field!r} with {text!r} and {answer!r} each "
            f"(fields: {', '.join(sorted(fields)) or 'none'}{faults}); name another `field`, or another folder"
        )
    return items


def _item(i: int, entry: Any, field: str, text: str, answer: str, check: Check | None) -> Item:
    complete = isinstance(entry, dict) and entry.get(answer) is not None
    clean = clean_text(entry.get(text)) if complete else None
    if clean is None:
        given = entry if isinstance(entry, dict) else {}
        return Item(i, "", given, f"field {field}: an entry that lacks its {text} or {answer}")
    fault = check(entry[answer]) if check else None
    return Item(i, "", {}, f"field {field}: {fault}") if fault else Item(i, clean, entry)


class ItemMaker:
    """Makes batches of items. Each image of an item's record is one row, always with the item's text; the rows of an item are
    consecutive.

    Args:
        images: images of a record.
        target: function that returns the targets of items, one row for each item.
        cache: keep the transformed images in memory.
        strict: raise UserError for an item that cannot be used (evaluation), instead of dropping it by name (training).
        regions: source of the regions of each image, for a model that reads regions.
        states: stored states of the images, which are read instead of their pixels.
        left_out: number of items of the split that are not among `items`.
    """

    def __init__(
        self,
        shards: Shards,
        items: list[Item],
        transform: Transform,
        tokenizer: Tokenizer,
        *,
        images: int,
        target: Callable[[list[Item]], Tensor],
        max_length: int,
        cache: bool,
        strict: bool,
        regions: RegionSource | None = None,
        states: StatesFile | None = None,
        left_out: int = 0,
    ):
        self.reader = RecordReader(
            shards, transform, images=images, regions=regions, cache=cache, states=states, strict=strict
        )
        self.shards, self.items, self.transform, self.tokenizer = shards, items, transform, tokenizer
        self.images, self.target, self.max_length, self.regions = images, target, max_length, regions
        self.left_out = left_out

    def __call__(self, rows: list[Row]) -> tuple[Batch, list[Dropped]]:
        read, dropped = self.reader.read_each(lambda row: (self._read(self.items[row.index]), row.seed), rows)
        seeds = [seed if k == 0 else hash64(seed, k) for _, seed in read for k in range(self.images)]
        size, items = self.transform.size, [part.item for part, _ in read]
        images = [image for part, _ in read for image in part.images]
        regions = [image for part, _ in read for image in part.regions]
        texts = [(item.text, *item.following) for item in items for _ in range(self.images)]
        ids, length = encode_joined(self.tokenizer, texts, self.max_length)
        batch = Batch(
            image=torch.stack(images) if images else torch.empty(0, 3, size, size, dtype=torch.uint8),
            ids=ids,
            length=length,
            seed=torch.tensor(seeds, dtype=torch.int64),
            slot=torch.arange(self.images).repeat(len(items)) if self.images > 1 else None,
            target=self.target(items),
            regions=pad_regions(regions) if regions else None,
        )
        return batch, dropped

    def lengths(self) -> Lengths:
        """Counts the tokens and regions of each item, in all of its rows together. This tokenises every text and reads the info
        of every record."""
        texts, counts = (
            [(item.text, *item.following) for item in self.items],
            torch.zeros(len(self.items), dtype=torch.int64),
        )
        if self.regions is not None:
            for i, item in enumerate(self.items):
                with suppress(RecordError):
                    counts[i] = region_count(self.regions, self.shards.info(item.record))
        parts = [texts[i : i + 4096] for i in range(0, len(texts), 4096)]
        length_N = torch.cat([encode_joined(self.tokenizer, part, self.max_length)[1] for part in parts])
        return Lengths(((length_N + counts) * self.images).int().numpy(), np.arange(len(texts) + 1, dtype=np.int32))

    def _read(self, item: Item) -> ItemImages:
        record = self.reader.record(item.record)
        if not item.text:
            self.shards.read(item.record)  # raises RecordError if the whole record is unreadable
            raise RecordError(record.key, item.fault)
        images, regions = record.images, record.regions
        if item.box is not None:
            box_R4 = record.visible_boxes(torch.tensor([item.box]))
            if not has_area(box_R4).all():
                raise RecordError(record.key, f"the box of {item.text!r} is not in the picture (set `fit` to squash)")
            item = item._replace(box=tuple(box_R4[0].tolist()))
        return ItemImages(item, images, regions)


def encode_joined(tokenizer: Tokenizer, texts: list[tuple[str, ...]], max_length: int) -> tuple[Tensor, Tensor]:
    """Returns `<s> first </s> second </s> ...` as ids int64 [B L], padded on the right, and their lengths [B]. If the texts of
    a row are too long together, the longest one is cut at its end."""
    ids_TL, length_T = tokenizer.encode([text for joined in texts for text in joined], max_length)
    if all(len(joined) == 1 for joined in texts):
        return ids_TL, length_T
    parts = iter(ids[:n] for ids, n in zip(ids_TL.tolist(), length_T.tolist()))
    rows = []
    for joined in texts:
        row = [part[k > 0 :] for k, part in enumerate(islice(parts, len(joined)))]
        while sum(map(len, row)) > max_length:
            max(row, key=len).pop(-2)
        rows.append(torch.tensor([i for part in row for i in part]))
    return pad_sequence(rows, batch_first=True, padding_value=tokenizer.pad), torch.tensor([len(row) for row in rows])


def batches_in_order(items: ItemMaker, batch_size: int, device: torch.device | str) -> Iterator[Batch]:
    """Yields all items in batches, each once and in order, on `device`."""
    for batch, _ in Loader(len(items.items), items, batch_size=batch_size, seed=0).once():
        yield batch.to(device)
