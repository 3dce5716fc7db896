"""Image-text pairs: the config of a run's data, and how its records become batches."""

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
    """The rows of a split, and the functions that make batches of them.

    Attributes:
        count: number of rows.
        make: makes a batch from a list of rows. Returns it with the records that could not be used.
        damage: the parts of the shards that cannot be read; they have no rows.
        lengths: reads the number of tokens of every row, to group rows by length.
        content: a hash of the records, by which a resumed run recognises data that were moved; None if there is no hash.
        reading: how records are read in the order in which they are stored; None for random order.
        make_hashed: like `make`, for contrastive objectives: its batches have `Batch.content`, for which each image is hashed
            once in a run. None if the data cannot make such batches.
        mixture: the data sets that training mixes, and their shares; None if each row is shown once an epoch.
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
    """The data of a run, and how its rows are read and made into batches."""

    batch_size: Annotated[int, Range(least=1, most=1 << 24)]
    """Number of rows of one micro-batch on one rank."""
    workers: Annotated[int, Range(least=0, most=1024)] = 0
    """Number of processes that load data; 0 loads in a thread of the training process."""
    cache: bool = True
    """Keep decoded images in memory, in at most half of the free memory."""
    max_length: Annotated[int, Range(least=2)] = 50
    """Largest number of tokens of a text, including `<s>` and `</s>`; a longer text is cut at its end."""
    fit: Fit = "crop"
    """How an image becomes a square: crop cuts out the square in its middle, centre cuts out seven eighths of that square,
    squash changes its aspect ratio, and letterbox puts the whole image on a grey square."""
    group: Count | None = None
    """Make training batches of rows of similar length: sort this many shuffled rows by length and cut them into batches."""
    max_tokens: Count | None = None
    """Token budget of one micro-batch on one rank, in place of `batch_size`. The micro-batch has as many rows as fit, where
    each row counts as many tokens as the longest. Rows are sorted by length among `group` rows, by default 32768."""
    fill: Literal["official"] | None = None
    """How the token budget is filled: official makes batches that are as small as those of UNITER's released code."""

    def __post_init__(self) -> None:
        if any(value is not None and value < 1 for value in (self.group, self.max_tokens)):
            raise UserError("`data.group` and `data.max_tokens` must be at least 1; leave them out to switch them off")
        if self.fill is not None and self.max_tokens is None:
            raise UserError("`data.fill` says how a token budget is filled; give `data.max_tokens` too")

    @property
    def grouping(self) -> Grouping | None:
        if self.group is None and self.max_tokens is None:
            return None
        given = {} if self.group is None else {"group": self.group}
        return Grouping(**given, max_tokens=self.max_tokens, reset_longest=self.fill != "official")

    @property
    def reads_mirrored_states(self) -> bool:
        """Whether training can also read stored states of mirrored images."""
        return False

    @abc.abstractmethod
    def rows(
        self, split: Split, tokenizer: Tokenizer, size: int, *, strict: bool, stored: Stored | None = None
    ) -> Rows | None:
        """Returns the rows of a split, with images of `size` x `size` pixels; None if the data have no such split.

        Args:
            strict: whether an unreadable record raises an error (evaluation) or is left out and named (training).
            stored: stored states of frozen encoders, to read instead of pixels and texts; None if there are none.
        """

    def cut(self, tokenizer: Tokenizer) -> CaptionCut | None:
        """Counts the tokens that `max_length` cuts off, in a sample of the training captions; None without captions."""
        return None

    def content(self, split: Split) -> str | None:
        """Returns a hash of the records of a split, as in its `Rows`; None if there is no hash."""
        return None

    @abc.abstractmethod
    def texts(self) -> Iterator[str]:
        """Yields the training texts, to train a tokenizer on."""

    def of_pairs(self, train: str) -> Data:
        """Returns the same options with a folder of image-text pairs as the only data. Raises UserError if the run needs data
        of another kind."""
        raise UserError(
            f"{type(self).__name__} reads data of its own kind, and cannot be used with image-text pairs instead"
        )


@dataclass(frozen=True, kw_only=True)
class PairData(Data):
    """Image-text pairs in shards; each epoch reads one caption of each record."""

    train: str
    """Folder of shards to train on."""
    mix: Mapping[str, PositiveShare] | None = None
    """Further folders of shards to train on, each with its share of the rows of an epoch; the other rows are from `train`."""
    val: str | None = None
    """Folder of shards to validate on."""
    test: str | None = None
    """Folder of shards to test on."""
    captions: str = "captions"
    """Field of a record that holds its list of captions. `captions_zh` holds the Chinese captions; `captions+captions_zh` uses
    both, for a model of two languages."""
    regions: RegionSource | None = None
    """Regions to load with each image."""
    vocab_records: Count | None = 500_000
    """Number of records whose texts a new tokenizer is trained on. They are spread evenly over the data, and are the same for
    every seed of the run. None uses all records."""
    order: Literal["random", "sequential"] = "random"
    """Order of the training records. random reads each record separately. sequential reads shard after shard and shuffles the
    records in a buffer; use it for remote data."""
    shuffle_buffer: Count = 4096
    """With sequential order: number of records in the memory of each rank, from which the next record is drawn."""
    streams: Count = 1
    """With sequential order: number of parts of the data that each rank reads at the same time. It must be a multiple of
    `workers`, which share the parts."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_mix()
        if self.order != "sequential":
            return
        if self.grouping is not None:
            raise UserError(
                "`data.order` sequential reads records in the order in which they are stored, so rows cannot be grouped by "
                "length; leave out `data.group` and `data.max_tokens`"
            )
        if self.streams % max(1, self.workers):
            raise UserError(
                f"`data.streams` {self.streams} cannot be shared equally by `data.workers` {self.workers}; set "
                f"`data.streams` to a multiple of it, such as {self.workers}"
            )

    def _check_mix(self) -> None:
        mix = self.mix or {}
        if sum(mix.values()) >= 1:
            raise UserError(
                f"`data.mix`: the shares sum to {sum(mix.values()):g}, and no rows would be left for `data.train`; lower them "
                f"to less than 1 in all"
            )
        if self.train in mix:
            raise UserError(
                f"`data.mix` names {self.train}, which is also `data.train`; leave it out of `data.mix`: it gets the other rows"
            )
        if mix and self.order == "sequential":
            raise UserError("`data.order` sequential cannot mix data sets; leave out `data.mix`")

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
            # If there is no room for the states of the mirrored images, images are encoded at each step.
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
        # Reading a remote record takes a tenth of a second.
        most = 100 if "://" in self.train else 2000
        return sample_cut(joined(self._parts("train")), self.captions, tokenizer, self.max_length, most)

    def texts(self) -> Iterator[str]:
        """Yields the captions, and the questions and statements in the same languages, of at most `vocab_records` records."""
        ahead = self._reading(Shards(self.train)).block if self.order == "sequential" else 0
        return vocabulary_texts(joined(self._parts("train")), self.captions, ahead, self.vocab_records)

    def of_pairs(self, train: str) -> PairData:
        return replace(self, train=train, mix=None, val=None, test=None)

    def _parts(self, split: Split) -> list[Shards]:
        """Returns the shards of a split, for training also those of `mix`; an empty list if there is no such split."""
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
                    f"`data.mix`: the share of {folder} is {share:g}, which is less than one of the {count:,} rows of an "
                    f"epoch; give it at least 1 / {count}, or leave it out"
                )
        return mixture


class Pair(NamedTuple):
    """One row of a batch: an image as the model sees it (or its stored states), its text, and the row's seed. It may also have
    the image's regions, stored states of the text, a hash of the image, and a teacher's vectors of image and text."""

    image: Tensor
    text: str
    seed: int
    regions: list[ImageRegions]
    text_states: Tensor | None = None
    image_hash: int = 0
    teacher: tuple[Tensor, Tensor] | None = None


class PairMaker:
    """Makes batches of rows. A row has the record's first image, and one of its captions, which the row's seed chooses.

    Args:
        captions: the field of `info` that holds a list of captions (or a single caption).
        max_length: largest number of tokens of a row, including <s> and </s>; longer captions are cut.
        regions, cache, states, strict: as in `RecordReader`.
        texts: stored states of all captions, which are added to the batches.
        mirrored: stored states of the mirrored images.
        teacher: a teacher's vectors of all images and captions, which are added to the batches.
        flip: share of the rows that read mirrored states: the rows that `augment` would mirror.
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
        """Returns a copy whose batches have `content`."""
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
        # Checked first, because decoding the image of a record without a caption would be wasted work.
        captions = usable_captions(record.info, self.captions)
        if not captions:
            fields = ", ".join(sorted(record.info)) or "none"
            raise RecordError(record.key, f"no usable caption in {self.captions!r} (fields: {fields})")
        # A hash of the seed is used, because objectives draw from the seed itself, and the draws must be independent.
        k = hash64(row.seed) % len(captions)
        states = None if self.texts is None else self.texts.entry(self.texts.of_record(row.index)[k])
        image, regions, image_hash = record.images[0], record.regions, 0
        if self.image_hashes is not None:
            image_hash = self.image_hashes(row.index, image, regions[0].feature_RF if regions else None)
        if self.mirrored is not None and is_mirrored(row.seed, self.flip):
            image = self.mirrored.image(row.index)
        taught = None if self.teacher is None else self.teacher.of(row.index, k)
        return Pair(image, captions[k], row.seed, regions, states, image_hash, taught)
