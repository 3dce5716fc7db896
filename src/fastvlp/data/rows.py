"""What a run reads: a description of its data that gives the rows of a split."""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from fastvlp.batch import Batch, Dropped
from fastvlp.data.loader import PairMaker, Row, clean_caption, usable_captions
from fastvlp.data.regions import RegionSource
from fastvlp.data.shards import RecordError, Shards
from fastvlp.data.tokenize import Tokenizer
from fastvlp.data.transform import Transform
from fastvlp.errors import UserError

if TYPE_CHECKING:
    from fastvlp.model.image import ImageConfig

Split = Literal["train", "val", "test"]
Fit = Literal["crop", "squash", "letterbox"]


@dataclass(frozen=True)
class Rows:
    """`count` rows, and how a list of them becomes a batch (and what of it could not be read). damage: what the shards
    themselves lack, which is in no row."""

    count: int
    make: Callable[[list[Row]], tuple[Batch, list[Dropped]]]
    damage: tuple[Dropped, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Data(abc.ABC):
    """batch_size: rows of one micro-batch on one rank. workers: loader processes; 0 loads in the training process.
    cache: keep decoded images in memory. max_length: tokens of a text, `<s>` and `</s>` included; what is longer loses
    its end. fit: how an image becomes a square."""

    batch_size: int
    workers: int = 0
    cache: bool = True
    max_length: int = 50
    fit: Fit = "crop"

    @abc.abstractmethod
    def rows(self, split: Split, tokenizer: Tokenizer, image: ImageConfig, *, strict: bool) -> Rows | None:
        """Rows with images as `image` wants them; None where there is no such split. `strict` raises where a record is
        unreadable (evaluation); otherwise the record is dropped and named (training)."""

    @abc.abstractmethod
    def texts(self) -> Iterator[str]:
        """The training texts, to train a tokenizer on."""


def readable_infos(shards: Shards) -> Iterator[dict[str, Any]]:
    """The info of every record where it can be read; who makes a batch of another one meets its error."""
    for i in range(len(shards)):
        with suppress(RecordError):
            yield shards.info(i)


@dataclass(frozen=True, kw_only=True)
class PairData(Data):
    """Image-text pairs in shards. `captions`: the field of a record that holds its list of captions (`captions_zh`: the
    Chinese ones); each epoch reads one of them. `regions`: parts of each image that come along."""

    train: str
    val: str | None = None
    test: str | None = None
    captions: str = "captions"
    regions: RegionSource | None = None

    def rows(self, split: Split, tokenizer: Tokenizer, image: ImageConfig, *, strict: bool) -> Rows | None:
        folder = {"train": self.train, "val": self.val, "test": self.test}[split]
        if folder is None:
            return None
        shards = Shards(folder)
        make = PairMaker(
            shards,
            Transform(size=image.size, mode=self.fit),
            tokenizer,
            captions=self.captions,
            max_length=self.max_length,
            regions=self.regions,
            cache=self.cache,
            strict=strict,
        )
        return Rows(len(shards), make, tuple(shards.damage))

    def texts(self) -> Iterator[str]:
        """Captions, and whatever else the records say in that language: fine-tuning meets the questions later."""
        language = self.captions.removeprefix("captions")
        found = False
        for info in readable_infos(Shards(self.train)):
            captions = usable_captions(info, self.captions)
            found |= bool(captions)
            yield from captions
            for field, text in ((f"questions{language}", "question"), (f"statements{language}", "text")):
                told = info.get(field)
                entries = [entry for entry in told if isinstance(entry, dict)] if isinstance(told, list) else []
                yield from filter(None, (clean_caption(entry.get(text)) for entry in entries))
        if not found:
            raise UserError(f"{self.train}: no record has {self.captions!r}; name the field with --data.captions")
