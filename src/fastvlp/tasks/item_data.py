"""The data of a task whose records hold lists of texts: questions, statements, expressions."""

from __future__ import annotations

import abc
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from fastvlp.data.pairs import Data, PairData, Rows, Split
from fastvlp.data.records.shards import Shards
from fastvlp.data.records.transform import Transform
from fastvlp.data.regions import RegionSource
from fastvlp.data.stores import Stored
from fastvlp.data.tokenize import Tokenizer
from fastvlp.errors import UserError
from fastvlp.tasks.items import Item, ItemMaker


@dataclass(frozen=True, kw_only=True)
class ItemData(Data, abc.ABC):
    """Texts about the records of shards, each with its right answer. `batch_size` counts texts. `max_tokens` counts the words
    and regions of a text together with all of its images."""

    train: str
    """Folder of the training split."""
    val: str | None = None
    """Folder of the validation split."""
    test: str | None = None
    """Folder of the test split."""
    regions: RegionSource | None = None
    """Source of the regions of each image, for models that read regions."""

    @abc.abstractmethod
    def read(self, shards: Shards) -> list[Item]:
        """Reads all items of a split with `read_items`."""

    @abc.abstractmethod
    def target(self, items: list[Item]) -> Tensor:
        """Returns the targets of the items, one row for each."""

    def used_in_training(self, item: Item) -> bool:
        """Whether training uses the item."""
        return True

    def used_in_evaluation(self, item: Item) -> bool:
        """Whether validation and scores use the item; others are counted."""
        return True

    @property
    def images(self) -> int:
        """Number of images of a record."""
        return 1

    def items(
        self, split: Split, tokenizer: Tokenizer, size: int, *, strict: bool, stored: Stored | None = None
    ) -> ItemMaker | None:
        """Returns the items of a split, with images of `size` x `size` pixels; None if there is no such split. `strict`,
        `stored`: as in `rows`."""
        if folder_of(self, split) is None:
            return None
        shards = split_shards(self, split)
        items, transform = self.read(shards), Transform(size=size, mode=self.fit)
        is_used = self.used_in_training if split == "train" else self.used_in_evaluation
        used = [item for item in items if is_used(item)]
        return ItemMaker(
            shards,
            used,
            transform,
            tokenizer,
            images=self.images,
            target=self.target,
            max_length=self.max_length,
            cache=self.cache,
            strict=strict,
            regions=self.regions,
            states=stored.images.open(shards, transform, self.images) if stored and stored.images else None,
            left_out=len(items) - len(used),
        )

    def rows(
        self, split: Split, tokenizer: Tokenizer, size: int, *, strict: bool, stored: Stored | None = None
    ) -> Rows | None:
        items = self.items(split, tokenizer, size, strict=strict, stored=stored)
        return None if items is None else Rows(len(items.items), items, tuple(items.shards.damage), items.lengths)

    def evaluation_items(
        self, split: Split, tokenizer: Tokenizer, size: int, stored: Stored | None = None
    ) -> ItemMaker:
        """Returns the items of a split, to be scored. Raises UserError if there is no such split; and when a batch is made, for
        a record that cannot be used."""
        items = self.items(split, tokenizer, size, strict=True, stored=stored)
        if items is None:
            raise no_split(split)
        return items

    def texts(self) -> Iterator[str]:
        return (item.text for item in self.read(Shards(self.train)) if item.text)


TaskData = ItemData | PairData


def folder_of(data: TaskData, split: Split) -> str | None:
    """Returns the folder of a split; None if there is none."""
    return {"train": data.train, "val": data.val, "test": data.test}[split]


def split_shards(data: TaskData, split: Split) -> Shards:
    """Opens the records of a split. Raises UserError if there is no such split."""
    folder = folder_of(data, split)
    if folder is None:
        raise no_split(split)
    return Shards(folder)


def no_split(split: Split) -> UserError:
    return UserError(f"the data has no {split!r} split; choose another `split`, or `data` that has it")
