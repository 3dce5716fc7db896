"""What the tasks share: texts about records with something to be told of each, and a head on the model's summary."""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from fastvlp.batch import Batch, Dropped, Regions, has_area
from fastvlp.data.loader import Loader, Row
from fastvlp.data.pairs import Data, Rows, Split
from fastvlp.data.reader import RecordReader
from fastvlp.data.records.schema import clean_text
from fastvlp.data.records.shards import RecordError, Shards
from fastvlp.data.records.transform import Transform
from fastvlp.data.regions import ImageRegions, RegionSource, pad_regions
from fastvlp.data.tokenize import Tokenizer
from fastvlp.errors import UserError
from fastvlp.model.layers import initialise
from fastvlp.model.model import Bos, ModelConfig, Reading, VLModel
from fastvlp.objectives.objective import Objective, ObjectiveConfig
from fastvlp.random import hash64
from fastvlp.tasks.uniter_heads import answer_head


class Item(NamedTuple):
    """A text about a record's images; `told` is its entry in the record's info (answers, label, kind, ...). An entry that
    cannot be used has no text; `wrong` says why. more: texts that follow, each ended by a </s> of its own. box: what the
    text is about, x0 y0 x1 y1 in pixels of the first stored image; in a batch as fractions of what the model sees."""

    record: int
    text: str
    told: Mapping[str, Any]
    wrong: str = ""
    more: tuple[str, ...] = ()
    box: tuple[float, ...] | None = None


class Shown(NamedTuple):
    """An item with its images as the model sees them, and their regions where it reads some."""

    item: Item
    images: list[Tensor]
    regions: list[ImageRegions]


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
    usable = clean_text(entry.get(text)) if whole else None
    if usable is None:
        return Item(i, "", {}, f"field {field}: an entry that lacks its {text} or {told}")
    wrong = fault(entry[told]) if fault else None
    return Item(i, "", {}, f"field {field}: {wrong}") if wrong else Item(i, usable, entry)


class ItemMaker:
    """Rows of items to batches: the record's `images` images, each beside the same text, in consecutive rows.

    `target`: what the items are scored against, one row an item. regions: parts of each image that come along. strict:
    raise UserError where an item cannot be used.
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
    ):
        self.reader = RecordReader(shards, transform, images=images, regions=regions, cache=cache, strict=strict)
        self.shards, self.items, self.transform, self.tokenizer = shards, items, transform, tokenizer
        self.images, self.target, self.max_length = images, target, max_length

    def __call__(self, rows: list[Row]) -> tuple[Batch, list[Dropped]]:
        read, dropped = self.reader.read_each(lambda row: (self._show(self.items[row.index]), row.seed), rows)
        shown = [one for one, _ in read]
        seeds = [seed if k == 0 else hash64(seed, k) for _, seed in read for k in range(self.images)]
        size, used = self.transform.size, [one.item for one in shown]
        pictures = [image for one in shown for image in one.images]
        regions = [part for one in shown for part in one.regions]
        texts = [(item.text, *item.more) for item in used for _ in range(self.images)]
        ids, length = encode_joined(self.tokenizer, texts, self.max_length)
        batch = Batch(
            image=torch.stack(pictures) if pictures else torch.empty(0, 3, size, size, dtype=torch.uint8),
            ids=ids,
            length=length,
            seed=torch.tensor(seeds, dtype=torch.int64),
            slot=torch.arange(self.images).repeat(len(used)) if self.images > 1 else None,
            target=self.target(used),
            regions=pad_regions(regions) if regions else None,
        )
        return batch, dropped

    def _show(self, item: Item) -> Shown:
        record = self.reader.record(item.record)
        if not item.text:
            self.shards.read(item.record)  # raises where the whole record is unreadable
            raise RecordError(record.key, item.wrong)
        images, regions = record.images, record.regions
        if item.box is not None:
            box_R4 = record.visible_boxes(torch.tensor([item.box]))
            if not has_area(box_R4).all():
                raise RecordError(record.key, f"what {item.text!r} means is not in the picture (choose --fit squash)")
            item = item._replace(box=tuple(box_R4[0].tolist()))
        return Shown(item, images, regions)


def encode_joined(tokenizer: Tokenizer, texts: list[tuple[str, ...]], max_length: int) -> tuple[Tensor, Tensor]:
    """`<s> first </s> second </s> ...` as ids int64 [B L], padded on the right, and their length [B]. Where all together
    are too long, the longest loses its end."""
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


@dataclass(frozen=True, kw_only=True)
class ItemData(Data, abc.ABC):
    """Texts about records in shards. train, val, test: folders of the splits. regions: parts of each image that come
    along."""

    train: str
    val: str | None = None
    test: str | None = None
    regions: RegionSource | None = None

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

    def maker(self, split: Split, tokenizer: Tokenizer, size: int, *, strict: bool) -> ItemMaker | None:
        """None where there is no such split. `strict` as in `rows`."""
        shards = self.shards(split)
        if shards is None:
            return None
        items = self.read(shards)
        return ItemMaker(
            shards,
            [item for item in items if self.wanted(item)] if split == "train" else items,
            Transform(size=size, mode=self.fit),
            tokenizer,
            images=self.images,
            target=self.target,
            max_length=self.max_length,
            cache=self.cache,
            strict=strict,
            regions=self.regions,
        )

    def rows(self, split: Split, tokenizer: Tokenizer, size: int, *, strict: bool) -> Rows | None:
        made = self.maker(split, tokenizer, size, strict=strict)
        return None if made is None else Rows(len(made.items), made, tuple(made.shards.damage))

    def strict(self, split: Split, tokenizer: Tokenizer, size: int) -> ItemMaker:
        """For evaluation: raises UserError where there is no such split, and later for a record that is unreadable."""
        made = self.maker(split, tokenizer, size, strict=True)
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
    """A head on the summaries of an item's rows together.

    Fusion models: a pooler (Linear, tanh) on the summary of each image beside the text, then Linear, LayerNorm, GELU,
    Linear: the heads of VQA (768-1536-A) and NLVR2 (1536-1536-2) in METER and FLM (spec 1.1, 5). Every reading gives a
    summary of the model's width, so a model with one stream over the text takes the same heads. A single stream over text
    and regions has a pooler of its own; its head is Linear, GELU, LayerNorm, Linear (UNITER), or the one given.
    """

    bos: Bos

    def __init__(
        self, config: HeadConfig, model: ModelConfig, *, images: int, outputs: int, head: nn.Module | None = None
    ):
        super().__init__()
        check_reads(config.reading, model, images)
        width = model.text.width
        self.reading, self.bos, self.images = config.reading, config.bos, images
        self.pool = nn.Linear(width, width) if model.single is None else None
        if head is None and model.single is not None:
            head = answer_head(width, outputs)
        self.head = head or nn.Sequential(
            nn.Linear(images * width, 2 * width), nn.LayerNorm(2 * width), nn.GELU(), nn.Linear(2 * width, outputs)
        )
        initialise(self, width)

    def pooled(
        self,
        model: VLModel,
        image_BKD: Tensor,
        ids_BL: Tensor,
        length_B: Tensor,
        regions: Regions | None,
        slot_B: Tensor | None = None,
    ) -> Tensor:
        """The summary of each row, [B D]."""
        if self.pool is None:
            return model.read_regions(image_BKD, regions, ids_BL, length_B, slot_B=slot_B).pooled
        summary = model.summarise(image_BKD, ids_BL, length_B, reading=self.reading, slot_B=slot_B, bos=self.bos)
        return torch.tanh(self.pool(summary))

    def logits(self, model: VLModel, image_BKD: Tensor, batch: Batch) -> Tensor:
        """[items outputs]; an item has `images` consecutive rows of the batch."""
        pooled = self.pooled(model, image_BKD, batch.ids, batch.length, batch.regions, batch.slot)
        return self.head(pooled.unflatten(0, (-1, self.images)).flatten(1)).float()


def check_reads(reading: Reading, model: ModelConfig, images: int = 1) -> None:
    """Raises UserError for a model that cannot read a text beside so many images in this way."""
    if model.single is not None:
        if reading != "full":
            raise UserError(f"a single stream over text and regions reads all at once; --reading full, not {reading}")
        if model.single.types <= images:
            raise UserError(
                f"the model knows {model.single.types - 1} image at most; set model.single.types {images + 1}"
            )
        return
    if reading == "flm" and model.reconstructor is None:
        raise UserError("reading 'flm' needs a model with a reconstructor; choose --reading full or causal")
    if model.fusion is None:
        raise UserError("the task reads text beside an image, and the model has no fusion layers: two towers alone")
    if model.fusion.slots < images:
        raise UserError(f"the model reads beside {model.fusion.slots} image at most; set model.fusion.slots {images}")


def target_of(batch: Batch) -> Tensor:
    """What `ItemMaker` told of the items, one row each."""
    if batch.target is None:
        raise ValueError("a batch without targets; tasks take the batches of an ItemMaker")
    return batch.target


def encoded(model: VLModel, batch: Batch) -> Tensor:
    """What the model reads of the batch's images, [B K D]."""
    return model.encode_image(batch.image, regions=batch.regions)


def batches(made: ItemMaker, batch_size: int, device: torch.device | str) -> Iterator[Batch]:
    """Every item once, in order."""
    for batch, _ in Loader(len(made.items), made, batch_size=batch_size, seed=0).once():
        yield batch.to(device)
