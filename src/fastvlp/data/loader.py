"""Which rows make batch number s, making them ahead of time, and the batches of image-text pairs.

Batch s is a pure function of (seed, s, rank, world, batch_size, grouping): resuming means starting at s, with any
number of workers.
"""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree
from torch.utils.data import DataLoader, Dataset

from fastvlp.batch import Batch, Dropped
from fastvlp.data.batching import Grouping, Lengths, Plan
from fastvlp.data.cache import ImageCache
from fastvlp.data.captions import clean_caption as clean_caption
from fastvlp.data.captions import usable_captions
from fastvlp.data.prefetch import Prefetch
from fastvlp.data.records.decode import decode, stored
from fastvlp.data.records.shards import RecordError, Shards
from fastvlp.data.records.transform import Transform
from fastvlp.data.regions import Found, RegionSource, pad_regions, read_regions
from fastvlp.data.tokenize import Tokenizer
from fastvlp.errors import UserError
from fastvlp.random import hash64, hash64_rows


class Row(NamedTuple):
    """The record's place in its source, and the row's random number: hash64(seed, epoch, index)."""

    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody needs
    seed: int


Made = tuple[Batch, list[Dropped]]
Planned = tuple[int, list[Row]]


class Loader:
    """Batches of rows over `count` records, shuffled, split over ranks.

    Args:
        count: records in the source.
        make: builds a batch from rows, and names what it dropped. Must be picklable where processes are spawned.
        batch_size: rows a rank and batch. The ranks' rows of one batch, in rank order, are the batch that one rank with
            batch_size * world would get. With a budget of tokens it is the size of evaluation's batches alone.
        workers: processes that make batches; 0 makes them in one thread, two batches ahead of their use.
        pin: copy batches to pinned memory, for copies to the GPU that do not wait.
        grouping: makes training's batches of rows of one length, which `lengths`, called once, tells.
    """

    def __init__(
        self,
        count: int,
        make: Callable[[list[Row]], Made],
        *,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        workers: int = 0,
        pin: bool = False,
        grouping: Grouping | None = None,
        lengths: Callable[[], Lengths] | None = None,
    ):
        if count < 1:
            raise UserError("the data set is empty; look at it with `vlp data inspect`")
        if batch_size < 1 or not 0 <= rank < world:
            raise ValueError(f"batch_size {batch_size}, rank {rank} of {world}")
        if grouping is not None and lengths is None:
            raise UserError("this data does not tell how long its rows are; leave out data.group and data.max_tokens")
        self.count = count
        self.make = make
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world = world
        self.workers = workers
        self.pin = pin
        self.grouping = grouping
        self.lengths = lengths
        self._orders: dict[int, Tensor] = {}

    def batches(self, start: int = 0) -> Iterator[Made]:
        """Endless, from batch number `start`. Epochs follow each other without a gap: a batch may straddle two.

        Raises UserError for a batch of which no record can be read, and for a row above the budget of tokens. Stops its
        thread or processes when it is closed or no longer referenced.
        """
        _ = self.plan  # its error is raised here, before there are processes
        return self._run((s, self.rows(s)) for s in itertools.count(start))

    def once(self) -> Iterator[Made]:
        """Every record once, in order, `rank::world` on each rank; the last batch is short. For evaluation."""
        mine = range(self.rank, self.count, self.world)
        parts = (mine[i : i + self.batch_size] for i in range(0, len(mine), self.batch_size))
        return self._run(enumerate([Row(i, hash64(self.seed, 0, i)) for i in part] for part in parts))

    def rows(self, s: int) -> list[Row]:
        """The rows of this rank in batch number s."""
        t = s * self.world + self.rank
        if self.plan is None:
            place_B = torch.arange(t * self.batch_size, (t + 1) * self.batch_size)
        else:
            place_B = self.plan.batch(t)
        return [Row(*row) for row in zip(*(part.tolist() for part in self._drawn(place_B)))]

    @cached_property
    def plan(self) -> Plan | None:
        """How rows are grouped, where they are."""
        if self.grouping is None or self.lengths is None:
            return None
        table = self.lengths()
        longest = int(table.tokens_T.max())
        shape = {"count": self.count, "batch_size": self.batch_size, "world": self.world, "seed": self.seed}
        return Plan(self.grouping, lambda place_N: table(*self._drawn(place_N)), longest, **shape)

    def _drawn(self, place_N: Tensor) -> tuple[Tensor, Tensor]:
        """Index and seed int64 [N] of places in the endless sequence of epochs."""
        epoch_N = place_N // self.count
        index_N = torch.empty_like(place_N)
        for epoch in epoch_N.unique().tolist():
            here_N = epoch_N == epoch
            index_N[here_N] = self._order(epoch)[place_N[here_N] % self.count]
        return index_N, hash64_rows(self.seed, epoch_N, index_N)

    def _order(self, epoch: int) -> Tensor:
        order = self._orders.get(epoch)
        if order is None:
            generator = torch.Generator().manual_seed(hash64(self.seed, epoch))
            order = torch.randperm(self.count, generator=generator)
            self._orders = {e: o for e, o in self._orders.items() if e == epoch - 1} | {epoch: order}
        return order

    def _run(self, planned: Iterator[Planned]) -> Iterator[Made]:
        batches = _Batches(self.make)
        if self.workers == 0:
            return Prefetch(self._finish(map(batches.__getitem__, planned)))
        # Threads inside the tokenizer do not survive the fork; unless told otherwise it warns and goes on without them.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        loader = DataLoader(
            batches,
            batch_size=None,
            sampler=planned,
            num_workers=self.workers,
            collate_fn=_as_is,
            worker_init_fn=_quiet_worker,
            # Without its own generator the loader draws from the global one, and the run depends on `workers`.
            generator=torch.Generator().manual_seed(0),
        )
        made = self._finish(iter(loader))
        return Prefetch(made) if self.pin else made

    def _finish(self, made: Iterator[Made | UserError]) -> Iterator[Made]:
        for result in made:
            if isinstance(result, UserError):
                # The traceback keeps this frame: workers left to the garbage collector take 5 s each to end.
                del made
                raise result
            batch, dropped = result
            yield (_pinned(batch) if self.pin else batch), dropped


class _Batches(Dataset):
    """Planned rows -> batch. A UserError is returned: a DataLoader would turn it into the text of a traceback."""

    def __init__(self, make: Callable[[list[Row]], Made]):
        self.make = make

    def __getitem__(self, planned: Planned) -> Made | UserError:
        s, rows = planned
        try:
            batch, dropped = self.make(rows)
        except UserError as error:
            return error
        if len(batch) == 0:
            names = "; ".join(f"{d.key}: {d.reason}" for d in dropped[:8])
            return UserError(f"no record of batch {s} can be used ({names}); look at the data with `vlp data inspect`")
        return batch, dropped


def _pinned(batch: Batch) -> Batch:
    return _pytree.tree_map_only(Tensor, lambda t: t.pin_memory(), batch)


def _as_is(made: Any) -> Any:
    return made


def _quiet_worker(_: int) -> None:
    # Ctrl-C and SIGTERM are for the main process, which saves and then closes its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def refusal(shards: Shards, dropped: list[Dropped]) -> UserError:
    """What an evaluation says of records that cannot be used: it leaves none out."""
    names = "; ".join(f"{d.key}: {d.reason}" for d in dropped[:8])
    return UserError(
        f"{shards.url}: {len(dropped)} records cannot be used ({names}), and an evaluation leaves none out; "
        f"mend or remove them (`vlp data inspect` lists all)"
    )


class Pair(NamedTuple):
    image: Tensor
    text: str
    seed: int
    regions: Found | None


class PairMaker:
    """Rows to image-text pairs: the record's first image, and one of its captions chosen by the row's seed.

    Args:
        captions: the field of `info` that holds a list of captions (or one).
        max_length: tokens of a row, <s> and </s> included; longer captions are cut.
        regions: parts of the image that come along.
        cache: keep the transformed images in memory, 3 * size**2 bytes each.
        strict: raise UserError where a record cannot be used (evaluation), instead of dropping and naming it.
    """

    def __init__(
        self,
        shards: Shards,
        transform: Transform,
        tokenizer: Tokenizer,
        *,
        captions: str = "captions",
        max_length: int,
        regions: RegionSource | None = None,
        cache: bool = False,
        strict: bool = False,
    ):
        if strict and shards.damage:
            raise refusal(shards, shards.damage)
        self.shards = shards
        self.transform = transform
        self.tokenizer = tokenizer
        self.captions = captions
        self.max_length = max_length
        self.regions = regions
        self.strict = strict
        self.cache = ImageCache(len(shards), transform.size) if cache else None

    def __call__(self, rows: list[Row]) -> Made:
        pairs: list[Pair] = []
        dropped: list[Dropped] = []
        for row in rows:
            try:
                pairs.append(self._pair(row))
            except RecordError as error:
                dropped.append(error.dropped)
        if dropped and self.strict:
            raise refusal(self.shards, dropped)
        ids, length = self.tokenizer.encode([pair.text for pair in pairs], self.max_length)
        size = self.transform.size
        images = [pair.image for pair in pairs]
        found = [pair.regions for pair in pairs if pair.regions is not None]
        batch = Batch(
            image=torch.stack(images) if images else torch.empty(0, 3, size, size, dtype=torch.uint8),
            ids=ids,
            length=length,
            seed=torch.tensor([pair.seed for pair in pairs], dtype=torch.int64),
            regions=pad_regions(found) if found else None,
        )
        return batch, dropped

    def _pair(self, row: Row) -> Pair:
        info: Mapping[str, Any]
        image = self.cache.get(row.index) if self.cache is not None else None
        detected: tuple[bytes, ...] = ()
        if self.cache is not None and image is not None:
            info, lies = self.shards.info(row.index), self.cache.stored(row.index)
            text = self._caption(row, info)
            if self.regions is not None and self.regions.stored:
                detected = self.shards.detected(row.index)
        else:
            record = self.shards.read(row.index)
            info, text, detected = record.info, self._caption(row, record.info), record.detected
            image, lies = decode(record, self.transform).images[0], stored(record.images[0])
            if self.cache is not None:
                self.cache.put(row.index, image, lies)
        found = None
        if self.regions is not None:
            key = self.shards.key(row.index)
            found = read_regions(self.regions, key, info, lies, self.transform, detected)
        return Pair(image, text, row.seed, found)

    def _caption(self, row: Row, info: Mapping[str, Any]) -> str:
        usable = usable_captions(info, self.captions)
        if not usable:
            reason = f"no usable caption in {self.captions!r} (fields: {', '.join(sorted(info)) or 'none'})"
            raise RecordError(self.shards.key(row.index), reason)
        # Hashed once more: the row's seed itself goes to the objective.
        return usable[hash64(row.seed) % len(usable)]
