"""What the tasks share: texts about records with something to be told of each, and a head on the model's summary."""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastvlp.batch import Batch, Dropped
from fastvlp.data.cache import ImageCache
from fastvlp.data.decode import decode
from fastvlp.data.loader import Loader, Row, clean_caption, refusal
from fastvlp.data.random import hash64
from fastvlp.data.rows import Data, Rows, Split
from fastvlp.data.shards import RecordError, Shards
from fastvlp.data.tokenize import Tokenizer
from fastvlp.data.transform import Transform
from fastvlp.errors import UserError
from fastvlp.model.image import ImageConfig
from fastvlp.model.layers import initialise
from fastvlp.model.model import Bos, ModelConfig, Reading, VLModel
from fastvlp.objectives.objective import Objective, ObjectiveConfig


class Item(NamedTuple):
    """A text about a record's images; `told` is its entry in the record's info (answers, label, kind, ...). An entry that
    cannot be used has no text; `wrong` says why."""

    record: int
    text: str
    told: Mapping[str, Any]
    wrong: str = ""


def read_items(
    shards: Shards, field: str, text: str, told: str, fault: Callable[[Any], str | None] | None = None
) -> list[Item]:
    """Every entry of `info[field]` of every record; `entry[text]` is its text, `entry[told]` what is told of it, and
    `fault` says what is wrong with that.

    A record whose info cannot be read, and an entry without one of the two or with a fault, is an item without text: who
    makes a batch of it meets the error. Raises UserError where no record has a usable entry.
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
        items += [_item(i, entry, field, text, told, fault) for entry in entries]
    if not any(item.text for item in items):
        faults = "".join(f"; {shards.key(item.record)}: {item.wrong}" for item in items[:3] if item.wrong)
        raise UserError(
            f"{shards.url}: no record has {field!r} with {text!r} and {told!r} each "
            f"(fields: {', '.join(sorted(fields)) or 'none'}{faults}); name another field or folder"
        )
    return items


def _item(i: int, entry: Any, field: str, text: str, told: str, fault: Callable[[Any], str | None] | None) -> Item:
    whole = isinstance(entry, dict) and entry.get(told) is not None
    usable = clean_caption(entry.get(text)) if whole else None
    if usable is None:
        return Item(i, "", {}, f"field {field}: an entry that lacks its {text} or {told}")
    wrong = fault(entry[told]) if fault else None
    return Item(i, "", {}, f"field {field}: {wrong}") if wrong else Item(i, usable, entry)


class ItemMaker:
    """Rows of items to batches: the record's `images` images, each beside the same text, in consecutive rows.

    `target`: what the items are scored against, one row an item. strict: raise UserError where an item cannot be used.
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
    ):
        self.shards, self.items, self.transform, self.tokenizer = shards, items, transform, tokenizer
        self.images, self.target, self.max_length, self.strict = images, target, max_length, strict
        self.cache = ImageCache(len(shards) * images, transform.size) if cache else None
        if strict and shards.damage:
            raise refusal(shards, shards.damage)

    def __call__(self, rows: list[Row]) -> tuple[Batch, list[Dropped]]:
        pictures: list[Tensor] = []
        used: list[Item] = []
        seeds: list[int] = []
        dropped: list[Dropped] = []
        for row in rows:
            item = self.items[row.index]
            try:
                pictures.extend(self._pictures(item))
            except RecordError as error:
                dropped.append(error.dropped)
                continue
            used.append(item)
            seeds.extend(row.seed if k == 0 else hash64(row.seed, k) for k in range(self.images))
        if dropped and self.strict:
            raise refusal(self.shards, dropped)
        size = self.transform.size
        ids, length = self.tokenizer.encode([item.text for item in used for _ in range(self.images)], self.max_length)
        batch = Batch(
            image=torch.stack(pictures) if pictures else torch.empty(0, 3, size, size, dtype=torch.uint8),
            ids=ids,
            length=length,
            seed=torch.tensor(seeds, dtype=torch.int64),
            slot=torch.arange(self.images).repeat(len(used)) if self.images > 1 else None,
            target=self.target(used),
        )
        return batch, dropped

    def _pictures(self, item: Item) -> list[Tensor]:
        places = range(item.record * self.images, (item.record + 1) * self.images)
        if self.cache is not None and item.text:
            kept = [image for image in map(self.cache.get, places) if image is not None]
            if len(kept) == self.images:
                return kept
        record = self.shards.read(item.record)
        if not item.text:
            raise RecordError(record.key, item.wrong)
        if len(record.images) != self.images:
            raise RecordError(record.key, f"has {len(record.images)} images, the task wants {self.images}")
        made = list(decode(record, self.transform).images)
        if self.cache is not None:
            for place, image in zip(places, made):
                self.cache.put(place, image)
        return made


@dataclass(frozen=True, kw_only=True)
class ItemData(Data, abc.ABC):
    """Texts about records in shards. train, val, test: folders of the splits."""

    train: str
    val: str | None = None
    test: str | None = None

    @abc.abstractmethod
    def read(self, shards: Shards) -> list[Item]:
        """All items of a split."""

    @abc.abstractmethod
    def target(self, items: list[Item]) -> Tensor:
        """What they are scored against, one row an item."""

    def wanted(self, item: Item) -> bool:
        """Whether training uses the item; evaluation uses all."""
        return True

    @property
    def images(self) -> int:
        return 1

    def shards(self, split: Split) -> Shards | None:
        folder = {"train": self.train, "val": self.val, "test": self.test}[split]
        return None if folder is None else Shards(folder)

    def maker(self, split: Split, tokenizer: Tokenizer, image: ImageConfig, *, strict: bool) -> ItemMaker | None:
        """None where there is no such split. `strict` as in `rows`."""
        shards = self.shards(split)
        if shards is None:
            return None
        items = self.read(shards)
        return ItemMaker(
            shards,
            [item for item in items if self.wanted(item)] if split == "train" else items,
            Transform(size=image.size, mode=self.fit),
            tokenizer,
            images=self.images,
            target=self.target,
            max_length=self.max_length,
            cache=self.cache,
            strict=strict,
        )

    def rows(self, split: Split, tokenizer: Tokenizer, image: ImageConfig, *, strict: bool) -> Rows | None:
        made = self.maker(split, tokenizer, image, strict=strict)
        return None if made is None else Rows(len(made.items), made, tuple(made.shards.damage))

    def strict(self, split: Split, tokenizer: Tokenizer, image: ImageConfig) -> ItemMaker:
        """For evaluation: raises UserError where there is no such split, and later for a record that is unreadable."""
        made = self.maker(split, tokenizer, image, strict=True)
        if made is None:
            raise UserError(f"the data has no {split!r} split; choose another --split, or --data FOLDER that has it")
        return made

    def texts(self) -> Iterator[str]:
        return (item.text for item in self.read(Shards(self.train)) if item.text)


@dataclass(frozen=True, kw_only=True)
class HeadConfig(ObjectiveConfig, abc.ABC):
    """reading: how the model reads the text, usually as it did in pretraining. bos: what its `<s>` saw there."""

    reading: Reading
    bos: Bos = "blind"


class HeadTask(Objective, abc.ABC):
    """Pooler (Linear, tanh) on the summary of each image beside the text, then Linear, LayerNorm, GELU, Linear on the
    summaries of an item together: the heads of VQA (768-1536-A) and NLVR2 (1536-1536-2) in METER and FLM (spec 1.1, 5).

    Every reading gives a summary of the model's width, so a one-stream model takes the same heads.
    """

    def __init__(self, config: HeadConfig, model: ModelConfig, *, images: int, outputs: int):
        super().__init__()
        if config.reading == "flm" and model.reconstructor is None:
            raise UserError("reading 'flm' needs a model with a reconstructor; choose --reading full or causal")
        if model.fusion is None:
            raise UserError("the task reads text beside an image, and the model has no fusion layers: two towers alone")
        if model.fusion.slots < images:
            raise UserError(
                f"the model reads beside {model.fusion.slots} image at most; set model.fusion.slots {images}"
            )
        width = model.text.layer.width
        self.reading, self.bos, self.images = config.reading, config.bos, images
        self.pool = nn.Linear(width, width)
        self.head = nn.Sequential(
            nn.Linear(images * width, 2 * width), nn.LayerNorm(2 * width), nn.GELU(), nn.Linear(2 * width, outputs)
        )
        initialise(self, width)

    def logits(self, model: VLModel, image_BKD: Tensor, batch: Batch) -> Tensor:
        """[items outputs]; an item has `images` consecutive rows of the batch."""
        summary = model.summarise(
            image_BKD, batch.ids, batch.length, reading=self.reading, slot_B=batch.slot, bos=self.bos
        )
        pooled = torch.tanh(self.pool(summary))
        return self.head(pooled.unflatten(0, (-1, self.images)).flatten(1)).float()


def target_of(batch: Batch) -> Tensor:
    """What `ItemMaker` told of the items, one row each."""
    if batch.target is None:
        raise ValueError("a batch without targets; tasks take the batches of an ItemMaker")
    return batch.target


def batches(made: ItemMaker, batch_size: int, device: torch.device | str) -> Iterator[Batch]:
    """Every item once, in order."""
    for batch, _ in Loader(len(made.items), made, batch_size=batch_size, seed=0).once():
        yield batch.to(device)
