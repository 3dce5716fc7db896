"""What a run reads: a description of its data that gives the rows of a split."""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, Literal

import torch

from fastvlp.batch import Batch, Dropped
from fastvlp.data.batching import Grouping, Lengths
from fastvlp.data.captions import clean_caption, usable_captions
from fastvlp.data.loader import PairMaker, Row
from fastvlp.data.records.schema import confidences_fault
from fastvlp.data.records.shards import RecordError, Shards
from fastvlp.data.records.transform import Transform
from fastvlp.data.regions import RegionSource
from fastvlp.data.tokenize import Tokenizer
from fastvlp.errors import UserError

Split = Literal["train", "val", "test"]
Fit = Literal["crop", "squash", "letterbox"]


@dataclass(frozen=True)
class Rows:
    """`count` rows, and how a list of them becomes a batch (and what of it could not be read). damage: what the shards
    themselves lack, which is in no row. lengths: reads how long the rows are, for whom groups them."""

    count: int
    make: Callable[[list[Row]], tuple[Batch, list[Dropped]]]
    damage: tuple[Dropped, ...] = ()
    lengths: Callable[[], Lengths] | None = None


@dataclass(frozen=True, kw_only=True)
class Data(abc.ABC):
    """batch_size: rows of one micro-batch on one rank. workers: loader processes; 0 loads in the training process.
    cache: keep decoded images in memory. max_length: tokens of a text, `<s>` and `</s>` included; what is longer loses
    its end. fit: how an image becomes a square.

    Training's batches can be made of rows of about one length. group: among how many shuffled rows such rows are sought.
    max_tokens: of one micro-batch on one rank, rows times the longest, instead of batch_size rows; the group is 32768
    rows where none is given. fill: `official` makes batches as small as UNITER's released code does (`budget_sizes`)."""

    batch_size: int
    workers: int = 0
    cache: bool = True
    max_length: int = 50
    fit: Fit = "crop"
    group: int | None = None
    max_tokens: int | None = None
    fill: Literal["official"] | None = None

    def __post_init__(self) -> None:
        if any(told is not None and told < 1 for told in (self.group, self.max_tokens)):
            raise UserError("data.group (rows) and data.max_tokens are at least 1; leave out what you do not want")
        if self.fill is not None and self.max_tokens is None:
            raise UserError("data.fill says how a budget of tokens is filled; give data.max_tokens too")

    @property
    def grouping(self) -> Grouping | None:
        if self.group is None and self.max_tokens is None:
            return None
        given = {} if self.group is None else {"group": self.group}
        return Grouping(**given, max_tokens=self.max_tokens, reset_longest=self.fill != "official")

    @abc.abstractmethod
    def rows(self, split: Split, tokenizer: Tokenizer, size: int, *, strict: bool) -> Rows | None:
        """Rows with images of `size` x `size` pixels; None where there is no such split. `strict` raises where a record
        is unreadable (evaluation); otherwise the record is dropped and named (training)."""

    @abc.abstractmethod
    def texts(self) -> Iterator[str]:
        """The training texts, to train a tokenizer on."""


def readable_infos(shards: Shards) -> Iterator[dict[str, Any]]:
    """The info of every record where it can be read; who makes a batch of another one meets its error."""
    for i in range(len(shards)):
        with suppress(RecordError):
            yield shards.info(i)


def caption_lengths(
    shards: Shards,
    tokenizer: Tokenizer,
    field: str,
    max_length: int,
    beside: Callable[[Mapping[str, Any]], int] = lambda _: 0,
) -> Lengths:
    """The rows of a `PairMaker`, by reading every record's info and tokenising every caption: half a minute for a million
    captions on one core, and 8 bytes kept for each. beside: tokens that fill a row besides its text, such as regions."""
    counts: list[int] = []
    others: list[int] = []

    def texts() -> Iterator[str]:
        for i in range(len(shards)):
            info: dict[str, Any] = {}
            with suppress(RecordError):
                info = shards.info(i)
            # Who makes its batch meets the error of a record without one.
            usable = usable_captions(info, field) or [""]
            counts.append(len(usable))
            others.append(beside(info))
            yield from usable

    stream = texts()
    parts = [tokenizer.encode(part, max_length)[1] for part in iter(lambda: list(islice(stream, 4096)), [])]
    count_N = torch.tensor(counts)
    tokens_T = torch.cat(parts) + torch.tensor(others).repeat_interleave(count_N)
    return Lengths(tokens_T, torch.cat([torch.zeros(1, dtype=torch.int64), count_N.cumsum(0)]))


def region_count(source: RegionSource | None, info: Mapping[str, Any]) -> int:
    """Regions that come along with a record, before those outside the picture are left out."""
    if source is None:
        return 0
    if source.grid is not None:
        return source.grid**2 + 1
    if source.stored:
        return 0 if confidences_fault(info.get("confidences")) else source.count(info["confidences"][0])
    told = info.get("objects")
    objects = [o for o in told if isinstance(o, dict) and o.get("image", 0) == 0] if isinstance(told, list) else []
    return max(1, min(len(objects), source.most) + source.whole)


_ASKED = (("questions", "question"), ("statements", "text"))


@dataclass(frozen=True, kw_only=True)
class PairData(Data):
    """Image-text pairs in shards. `captions`: the field of a record that holds its list of captions (`captions_zh`: the
    Chinese ones; `captions+captions_zh`: both, for a model of two languages); each epoch reads one of them. `regions`: parts
    of each image that come along."""

    train: str
    val: str | None = None
    test: str | None = None
    captions: str = "captions"
    regions: RegionSource | None = None

    def rows(self, split: Split, tokenizer: Tokenizer, size: int, *, strict: bool) -> Rows | None:
        folder = {"train": self.train, "val": self.val, "test": self.test}[split]
        if folder is None:
            return None
        shards = Shards(folder)
        make = PairMaker(
            shards,
            Transform(size=size, mode=self.fit),
            tokenizer,
            captions=self.captions,
            max_length=self.max_length,
            regions=self.regions,
            cache=self.cache,
            strict=strict,
        )
        regions = partial(region_count, self.regions)
        lengths = partial(caption_lengths, shards, tokenizer, self.captions, self.max_length, regions)
        return Rows(len(shards), make, tuple(shards.damage), lengths)

    def texts(self) -> Iterator[str]:
        """Captions, questions and statements in those languages: fine-tuning meets the last two later."""
        languages = [field.removeprefix("captions") for field in self.captions.split("+")]
        asked = [(f"{field}{language}", text) for language in languages for field, text in _ASKED]
        found = False
        for info in readable_infos(Shards(self.train)):
            captions = usable_captions(info, self.captions)
            found |= bool(captions)
            yield from captions
            for field, text in asked:
                told = info.get(field)
                entries = [entry for entry in told if isinstance(entry, dict)] if isinstance(told, list) else []
                yield from filter(None, (clean_caption(entry.get(text)) for entry in entries))
        if not found:
            raise UserError(f"{self.train}: no record has {self.captions!r}; name the field with --data.captions")
