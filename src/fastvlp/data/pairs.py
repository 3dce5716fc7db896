"""Image-text pairs: the config of a run's data, and the batches that are made of it."""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterator, Mapping
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fastvlp.batch import Batch, Dropped
from fastvlp.config import Count, PositiveShare, Range
from fastvlp.data.augment import is_mirrored
from fastvlp.data.batching import Grouping, Lengths
from fastvlp.data.caption_cut import CaptionCut, sample_cut
from fastvlp.data.contents import ImageHashes, text_hashes
from fastvlp.data.loader import Row
from fastvlp.data.reader import RecordReader
from fastvlp.data.records.interface import SplitRecords
from fastvlp.data.records.joined import joined
from fastvlp.data.records.schema import usable_captions
from fastvlp.data.records.shards import RecordError, Shards
from fastvlp.data.records.transform import Fit, Transform
from fastvlp.data.regions import ImageRegions, RegionSource, pad_regions
from fastvlp.data.row_order import Mixture
from fastvlp.data.sequential import BLOCK, SequentialReading
from fastvlp.data.states_file import StatesFile
from fastvlp.data.stored_lengths import caption_lengths
from fastvlp.data.stores import Stored
from fastvlp.data.teacher import TeacherVectors
from fastvlp.data.tokenize import Tokenizer
from fastvlp.data.vocabulary_texts import vocabulary_texts
from fastvlp.errors import UserError
from fastvlp.random import hash64

Split = Literal["train", "val", "test"]


@dataclass(frozen=True)
class Rows:
    """The rows of a split, and how a list of them becomes a batch.

    Attributes:
        count: number of rows.
        make: makes a batch of rows, and names the records that could not be used.
        damage: the parts of the shards that cannot be read, which have no rows.
        lengths: reads the number of tokens of every row, to group rows by length.
        content: a hash of the records, by which data that moved are recognised; None where there is none.
        reading: how records are read as they are stored; None: in random order.
        make_hashed: `make` for objectives that contrast rows: its batches have `Batch.content`, for which each image is hashed
            once in a run; None where the data cannot make such.
        mixture: the data sets that training mixes, and their shares; None: each row is shown once an epoch.
    """

    count: int
    make: Callable[[list[Row]], tuple[Batch, list[Dropped]]]
    damage: tuple[Dropped, ...] = ()
    lengths: Callable[[], Lengths] | None = None
    content: str | None = None
    reading: SequentialReading | None = None
    make_hashed: Callable[[list[Row]], tuple[Batch, list[Dropped]]] | None = None
    mixture: Mixture | None = None


@dataclass(frozen=True, kw_only=True)
class Data(abc.ABC):
    """The data of a run: how its rows are read and made into batches."""

    batch_size: Annotated[int, Range(least=1, most=1 << 24)]
    """Rows of one micro-batch on one rank."""
    workers: Annotated[int, Range(least=0, most=1024)] = 0
    """Processes that load; 0 loads in a thread of the training process."""
    cache: bool = True
    """Keep decoded images in memory, as many as half of the free memory has room for."""
    max_length: Annotated[int, Range(least=2)] = 50
    """The most tokens of a text, including `<s>` and `</s>`; a longer text is cut at its end."""
    fit: Fit = "crop"
    """How an image becomes a square: cut to its middle (crop), to seven eighths of that (centre), squashed, or whole on a grey
    square (letterbox)."""
    group: Count | None = None
    """Make training batches of rows of about the same length, chosen among this many shuffled rows."""
    max_tokens: Count | None = None
    """Token budget of one micro-batch on one rank, in place of `batch_size`: it has as many rows as fit, where each row counts
    as much as the longest. Rows are grouped by length among `group` rows, by default 32768."""
    fill: Literal["official"] | None = None
    """How the budget is filled: `official` makes batches as small as UNITER's released code does."""

    def __post_init__(self) -> None:
        if any(value is not None and value < 1 for value in (self.group, self.max_tokens)):
            raise UserError("`data.group` (rows) and `data.max_tokens` are at least 1; leave out what you do not want")
        if self.fill is not None and self.max_tokens is None:
            raise UserError("`data.fill` says how a budget of tokens is filled; give `data.max_tokens` too")

    @property
    def grouping(self) -> Grouping | None:
        if self.group is None and self.max_tokens is None:
            return None
        given = {} if self.group is None else {"group": self.group}
        return Grouping(**given, max_tokens=self.max_tokens, reset_longest=self.fill != "official")

    @property
    def reads_mirrored_states(self) -> bool:
        """Whether training can read stored states of mirrored images too."""
        return False

    @abc.abstractmethod
    def rows(
        self, split: Split, tokenizer: Tokenizer, size: int, *, strict: bool, stored: Stored | None = None
    ) -> Rows | None:
        """Rows with images of `size` x `size` pixels; None where there is no such split.

        Args:
            strict: whether an unreadable record raises an error (evaluation) or is left out and named (training).
            stored: states of frozen encoders, to read in place of pixels and texts; None if there are none.
        """

    def cut(self, tokenizer: Tokenizer) -> CaptionCut | None:
        """What `max_length` cuts of a sample of the training captions; None for data without captions."""
        return None

    def content(self, split: Split) -> str | None:
        """A hash of the records of a split, that of its `Rows`; None where there is none."""
        return None

    @abc.abstractmethod
    def texts(self) -> Iterator[str]:
        """The training texts, to train a tokenizer on."""

    def of_pairs(self, train: str) -> Data:
        """The same options with a folder of image-text pairs as the only data. Raises UserError where others are needed."""
        raise UserError(
            f"{type(self).__name__} reads data of its own kind, and image-text pairs cannot take their place"
        )


@dataclass(frozen=True, kw_only=True)
class PairData(Data):
    """Image-text pairs in shards; each epoch reads one caption of each record."""

    train: str
    """Folder of shards to train on."""
    mix: Mapping[str, PositiveShare] | None = None
    """Further folders of shards to train on, each with its share of the rows of an epoch; `train` gives the rest."""
    val: str | None = None
    """Folder of shards to validate on."""
    test: str | None = None
    """Folder of shards to test on."""
    captions: str = "captions"
    """Field of a record that holds its list of captions. `captions_zh`: the Chinese ones; `captions+captions_zh`: both, for
    a model of two languages."""
    regions: RegionSource | None = None
    """Regions to load with each image."""
    vocab_records: Count | None = 500_000
    """Records whose texts a new tokenizer is trained on, drawn evenly from all, the same for every seed of the run; None: all
    records."""
    order: Literal["random", "sequential"] = "random"
    """Order of training's records: `random`, which reads each by itself, or `sequential`, as they are stored, shard after
    shard, shuffled in a buffer, for data that are far away."""
    shuffle_buffer: Count = 4096
    """With `sequential`: records that wait in the memory of each rank, among which the next is drawn."""
    streams: Count = 1
    """With `sequential`: parts of the data that each rank reads side by side; a multiple of `workers`, which share them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_mix()
        if self.order != "sequential":
            return
        if self.grouping is not None:
            raise UserError(
                "`data.order` sequential reads records as they are stored, and rows of one length would be taken from all "
                "over the data; leave out `data.group` and `data.max_tokens`"
            )
        if self.streams % max(1, self.workers):
            raise UserError(
                f"`data.workers` {self.workers} cannot share `data.streams` {self.streams} (`data.order` is sequential): give "
                f"each as many of them, such as `data.streams` {self.workers}"
            )

    def _check_mix(self) -> None:
        mix = self.mix or {}
        if sum(mix.values()) >= 1:
            raise UserError(
                f"`data.mix` gives shares of an epoch's rows, here {sum(mix.values()):g} in all, and `data.train` the rest; "
                f"lower them to less than 1 in all"
            )
        if self.train in mix:
            raise UserError(f"`data.mix` names {self.train} too, which is `data.train` and has the rest; leave it out")
        if mix and self.order == "sequential":
            raise UserError("`data.order` sequential reads one data set as it is stored; leave out `data.mix`")

    def rows(
        self, split: Split, tokenizer: Tokenizer, size: int, *, strict: bool, stored: Stored | None = None
    ) -> Rows | None:
        parts = self._parts(split)
        if not parts:
            return None
        shards = joined(parts)
        transform = Transform(size=size, mode=self.fit)
        images = stored.images if stored else None
        states = images.open(shards, transform) if images else None
        mirrored = None
        if images and states and images.flip and split == "train":
            mirrored = images.open(shards, transform, mirrored=True)
            # Without room for both, all images are encoded.
            states = mirrored and states
        make = PairMaker(
            shards,
            transform,
            tokenizer,
            captions=self.captions,
            max_length=self.max_length,
            regions=self.regions,
            cache=self.cache,
            states=states,
            mirrored=mirrored,
            flip=images.flip if images else 0.0,
            texts=self._stored_texts(stored, shards, tokenizer),
            strict=strict,
            teacher=stored.teacher.open(shards, self.captions) if stored and stored.teacher else None,
        )
        lengths = partial(caption_lengths, shards, tokenizer, self.captions, self.max_length, self.regions)
        return Rows(
            len(shards),
            make,
            tuple(shards.damage),
            lengths,
            shards.content,
            reading=self._reading(parts[0]) if self.order == "sequential" else None,
            make_hashed=make.hashed(),
            mixture=self._mixture(parts),
        )

    def content(self, split: Split) -> str | None:
        parts = self._parts(split)
        return joined(parts).content if parts else None

    def _reading(self, shards: Shards) -> SequentialReading:
        block = max(1, BLOCK * len(shards) // max(1, shards.total_bytes))
        return SequentialReading(
            shards=shards, sizes=shards.sizes, buffer=self.shuffle_buffer, streams=self.streams, block=block
        )

    @property
    def reads_mirrored_states(self) -> bool:
        return self.regions is None

    def _stored_texts(self, stored: Stored | None, shards: SplitRecords, tokenizer: Tokenizer) -> StatesFile | None:
        if stored is None or stored.texts is None:
            return None
        return stored.texts.open(shards, tokenizer, self.captions, self.max_length)

    def cut(self, tokenizer: Tokenizer) -> CaptionCut | None:
        # A record of a store far away takes a tenth of a second.
        most = 100 if "://" in self.train else 2000
        return sample_cut(joined(self._parts("train")), self.captions, tokenizer, self.max_length, most)

    def texts(self) -> Iterator[str]:
        """Yields the captions, and the questions and statements in the same languages, of at most `vocab_records` records."""
        ahead = self._reading(Shards(self.train)).block if self.order == "sequential" else 0
        return vocabulary_texts(joined(self._parts("train")), self.captions, ahead, self.vocab_records)

    def of_pairs(self, train: str) -> PairData:
        return replace(self, train=train, mix=None, val=None, test=None)

    def _parts(self, split: Split) -> list[Shards]:
        """The shards of a split, of training those of `mix` too; none where there is no such split."""
        folder = {"train": self.train, "val": self.val, "test": self.test}[split]
        more = self.mix if split == "train" and self.mix else ()
        return [] if folder is None else [Shards(place) for place in (folder, *more)]

    def _mixture(self, parts: list[Shards]) -> Mixture | None:
        if len(parts) == 1 or self.mix is None:
            return None
        mixture = Mixture(tuple(map(len, parts)), (1 - sum(self.mix.values()), *self.mix.values()))
        count = sum(mixture.sizes)
        for folder, share in zip((self.train, *self.mix), mixture.shares):
            if share * count < 1:
                raise UserError(
                    f"`data.mix` leaves {folder} a share of {share:g}, less than one of the {count:,} rows of an epoch, so "
                    f"that it would not be shown; give it at least 1 / {count}, or leave it out"
                )
        return mixture


class Pair(NamedTuple):
    """An image as the model sees it (or its stored states), its text, the row's seed, the image's regions, if any, stored
    states of the text, and a hash of the image."""

    image: Tensor
    text: str
    seed: int
    regions: list[ImageRegions]
    text_states: Tensor | None = None
    image_hash: int = 0
    teacher: tuple[Tensor, Tensor] | None = None


class PairMaker:
    """Makes batches of rows: the record's first image, and one of its captions chosen by the row's seed.

    Args:
        captions: the field of `info` that holds a list of captions (or one).
        max_length: tokens of a row, <s> and </s> included; longer captions are cut.
        regions, cache, states, strict: as `RecordReader` takes them.
        texts: stored states of all captions, which come along.
        mirrored: stored states of the mirrored images.
        teacher: a teacher's vectors of all images and captions, which come along.
        flip: share of the rows that read these; those that `augment` would mirror.
    """

    def __init__(
        self,
        shards: SplitRecords,
        transform: Transform,
        tokenizer: Tokenizer,
        *,
        captions: str = "captions",
        max_length: int,
        regions: RegionSource | None = None,
        cache: bool = False,
        states: StatesFile | None = None,
        texts: StatesFile | None = None,
        mirrored: StatesFile | None = None,
        flip: float = 0.0,
        strict: bool = False,
        teacher: TeacherVectors | None = None,
    ):
        self.texts, self.teacher = texts, teacher
        self.mirrored = mirrored
        self.flip = flip
        self.reader = RecordReader(shards, transform, regions=regions, cache=cache, states=states, strict=strict)
        self.tokenizer = tokenizer
        self.captions = captions
        self.max_length = max_length
        self.image_hashes: ImageHashes | None = None

    def hashed(self) -> PairMaker:
        """The same, and its batches have `content`."""
        made = copy(self)
        made.image_hashes = ImageHashes(len(self.reader.shards))
        return made

    def __call__(self, rows: list[Row]) -> tuple[Batch, list[Dropped]]:
        pairs, dropped = self.reader.read_each(self._pair, rows)
        ids, length = self.tokenizer.encode([pair.text for pair in pairs], self.max_length)
        size = self.reader.transform.size
        images = [pair.image for pair in pairs]
        regions = [regions for pair in pairs for regions in pair.regions]
        texts = [pair.text_states for pair in pairs if pair.text_states is not None]
        content = None
        if self.image_hashes is not None:
            image_B = torch.tensor([pair.image_hash for pair in pairs], dtype=torch.int64)
            content = torch.stack([text_hashes(ids, length), image_B], 1)
        batch = Batch(
            image=torch.stack(images) if images else torch.empty(0, 3, size, size, dtype=torch.uint8),
            ids=ids,
            length=length,
            seed=torch.tensor([pair.seed for pair in pairs], dtype=torch.int64),
            regions=pad_regions(regions) if regions else None,
            text=pad_sequence(texts, batch_first=True) if texts else None,
            content=content,
        )
        taught = [pair.teacher for pair in pairs if pair.teacher is not None]
        if taught:
            image_BE, text_BE = (torch.stack(vectors).float() for vectors in zip(*taught))
            batch = replace(batch, teacher_image=image_BE, teacher_text=text_BE)
        return batch, dropped

    def _pair(self, row: Row) -> Pair:
        record = self.reader.record(row.index)
        # Checked before the image is decoded, which would be in vain without a caption.
        captions = usable_captions(record.info, self.captions)
        if not captions:
            fields = ", ".join(sorted(record.info)) or "none"
            raise RecordError(record.key, f"no usable caption in {self.captions!r} (fields: {fields})")
        # A hash of the seed, because the objective draws from the seed itself: the two draws must be independent.
        k = hash64(row.seed) % len(captions)
        states = None if self.texts is None else self.texts.entry(self.texts.of_record(row.index)[k])
        image, regions, image_hash = record.images[0], record.regions, 0
        if self.image_hashes is not None:
            image_hash = self.image_hashes(row.index, image, regions[0].feature_RF if regions else None)
        if self.mirrored is not None and is_mirrored(row.seed, self.flip):
            image = self.mirrored.image(row.index)
        taught = None if self.teacher is None else self.teacher.of(row.index, k)
        return Pair(image, captions[k], row.seed, regions, states, image_hash, taught)
