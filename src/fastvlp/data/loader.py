"""The loader: it decides which rows are in batch number s, and makes batches ahead of their use.

Batch s is a pure function of (seed, s, rank, world, batch_size, grouping). So a resumed run starts at batch s, with any number
of workers. With `planned_for` and `cut`, a step has the same rows on another number of ranks.
"""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree
from torch.utils.data import DataLoader, Dataset

from fastvlp.batch import Batch, Dropped
from fastvlp.data.batching import Grouping, Lengths, Plan
from fastvlp.data.prefetch import Prefetch
from fastvlp.data.row_order import MixedOrder, Mixture, RowOrder, ShuffledOrder
from fastvlp.data.sequential import HoldsRecords, ReadAhead, SequentialOrder, SequentialReading
from fastvlp.data.worker_processes import LESS_MEMORY, from_workers
from fastvlp.errors import UserError, remedy
from fastvlp.random import hash64, hash64_rows


class Row(NamedTuple):
    """The place of a record (or of a task's item) in its split, and the row's random number: hash64(seed, epoch, index)."""

    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody needs
    seed: int


Made = tuple[Batch, list[Dropped]]


class Planned(NamedTuple):
    """A batch to be made: its number, its rows, and the records that are read ahead before it is made."""

    s: int
    rows: list[Row]
    ahead: Sequence[int] = ()


class Loader:
    """Batches of rows over `count` records, shuffled, split over ranks.

    Args:
        count: number of records.
        make: makes a batch of rows, and returns the records that it dropped. It must be picklable if processes are spawned.
        batch_size: number of rows of a batch on one rank. The rows of all ranks together, in the order of the ranks, are the
            batch that a single rank with batch_size * world would get. With a token budget, it is only the size of batches in
            evaluation.
        workers: number of processes that make batches; 0 makes them in one thread, two batches ahead.
        pin: copy batches to pinned memory, for copies to the GPU that do not wait.
        grouping: makes the batches of training from rows of similar length.
        lengths: the lengths of the rows, for `grouping`; called once.
        reading: reads records as they are stored, through a buffer; None: in random order.
        planned_for: the number of ranks for which the batches are planned; by default `world`. The ranks get planned batches in
            turns.
        cut: number of equal parts into which a planned batch is divided; each part becomes a batch.
        mixture: the data sets of the records, and their shares; None: each record is shown once in an epoch.
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
        reading: SequentialReading | None = None,
        planned_for: int | None = None,
        cut: int = 1,
        mixture: Mixture | None = None,
    ):
        if count < 1:
            raise UserError("the data set is empty; check it with `vlp data inspect`")
        if batch_size < 1 or not 0 <= rank < world:
            raise ValueError(f"batch_size {batch_size}, rank {rank} of {world}")
        if grouping is not None and lengths is None:
            raise UserError(
                "this data does not say how long its rows are; leave out `data.group` and `data.max_tokens`"
            )
        self.count = count
        self.make = make
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world = world
        self.planned_for = planned_for or world
        self.cut = cut
        self.workers = workers
        self.pin = pin
        self.grouping = grouping
        self.lengths = lengths
        self.reading, self.stored_order = reading, None
        self.order: RowOrder = ShuffledOrder(count, seed) if mixture is None else MixedOrder(mixture, seed)
        if reading is not None and self.planned_for % world:
            raise UserError(
                f"`data.order` sequential: a part of the data is read for each of {self.planned_for} ranks, and {world} cannot "
                f"share these parts; continue on a number of ranks that divides {self.planned_for}"
            )
        if reading is not None:
            shape = {"count": count, "batch_size": batch_size, "world": self.planned_for, "seed": seed}
            self.stored_order = SequentialOrder(reading, **shape)
            self.order = self.stored_order

    def batches(self, start: int = 0) -> Iterator[Made]:
        """Yields batches without end, from number `start` on. A batch may contain the end of one epoch and the beginning of the
        next.

        Raises UserError if no record of a batch can be read, and if a row exceeds the token budget. The iterator stops its
        thread or processes when it is closed or no longer referenced.
        """
        _ = self.plan  # its error is raised here, before there are processes
        ahead = None if self.stored_order is None else ReadAhead(self.stored_order)
        numbers = itertools.count(start)
        return self._run(
            Planned(s, self.rows(s), () if ahead is None else ahead.before(self._planned_batch(s)[0])) for s in numbers
        )

    def once(self, rows: int | None = None) -> Iterator[Made]:
        """Yields every record once, in order, `rank::world` on each rank; the last batch may be shorter. For evaluation.

        `rows`: number of rows of a batch, instead of `batch_size`; the sizes of batches then differ by at most one row.
        """
        mine = range(self.rank, self.count, self.world)
        if rows is None:
            parts = [mine[i : i + self.batch_size] for i in range(0, len(mine), self.batch_size)]
        else:
            n, k = len(mine), max(1, round(len(mine) / rows))
            parts = [mine[i * n // k : (i + 1) * n // k] for i in range(k if n else 0)]
        ahead = self.reading is not None
        every = ([Row(i, hash64(self.seed, 0, i)) for i in part] for part in parts)
        return self._run(Planned(s, own, parts[s] if ahead else ()) for s, own in enumerate(every))

    def place(self, s: int) -> int:
        """Returns the number of rows, in the endless sequence of epochs, before batch number s of all ranks. If batches are
        divided, s is the first part of a planned batch."""
        t = s * self.world // self.cut
        return t * self.batch_size if self.plan is None else self.plan.place(t)

    def batch_behind(self, place: int) -> int:
        """Returns the number of the first batch that begins after this number of rows."""
        t = -(-place // self.batch_size) if self.plan is None else self.plan.batch_behind(place)
        return self.dealt(t)

    def dealt(self, t: int) -> int:
        """Returns the number of the first batch of all ranks that has no row of the first t planned batches."""
        return -(-t * self.cut // self.world)

    def planned(self, s: int) -> int:
        """Returns the number of batches before this rank's batch number s, counted for each of the ranks that the batches
        were planned for."""
        return -(-s * self.world // (self.cut * self.planned_for))

    def _planned_batch(self, s: int) -> tuple[int, int]:
        """Returns the number of the planned batch from which batch number s of this rank is made, and the number of its
        part."""
        return divmod(s * self.world + self.rank, self.cut)

    def rows(self, s: int) -> list[Row]:
        """Returns the rows of this rank in batch number s."""
        t, part = self._planned_batch(s)
        if self.plan is None:
            place_B = torch.arange(t * self.batch_size, (t + 1) * self.batch_size)
        else:
            place_B = self.plan.batch(t)
        place_B = place_B.tensor_split(self.cut)[part]
        return [Row(*row) for row in zip(*(column.tolist() for column in self._rows_at(place_B)))]

    @cached_property
    def plan(self) -> Plan | None:
        """Returns the grouping of rows by length; None without grouping."""
        if self.grouping is None or self.lengths is None:
            return None
        table = self.lengths()
        longest = int(table.tokens_T.max())
        shape = {"count": self.count, "batch_size": self.batch_size, "world": self.planned_for, "seed": self.seed}
        return Plan(self.grouping, lambda place_N: table(*self._rows_at(place_N)), longest, **shape)

    def _rows_at(self, place_N: Tensor) -> tuple[Tensor, Tensor]:
        """Returns index and seed, int64 [N], of the rows at these places in the endless sequence of epochs."""
        index_N, epoch_N = self.order.rows(place_N)
        return index_N, hash64_rows(self.seed, epoch_N, index_N)

    def _run(self, planned: Iterator[Planned]) -> Iterator[Made]:
        batches = _Batches(self.make, None if self.reading is None else self.reading.shards)
        if self.workers == 0:
            return Prefetch(self._finish(map(batches.__getitem__, planned)))
        # Threads inside the tokenizer do not survive the fork. Without this setting, the tokenizer prints a warning and
        # continues without them.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        loader = DataLoader(
            batches,
            batch_size=None,
            sampler=planned,
            num_workers=self.workers,
            collate_fn=_as_is,
            worker_init_fn=_quiet_worker,
            # Without a generator of its own, the loader draws from the global one, and the run would depend on `workers`.
            generator=torch.Generator().manual_seed(0),
        )
        made = self._finish(from_workers(loader))
        return Prefetch(made) if self.pin else made

    def _finish(self, made: Iterator[Made | UserError]) -> Iterator[Made]:
        for result in made:
            if isinstance(result, UserError):
                # The traceback keeps this frame alive. Workers that the garbage collector has to end would take 5 s each.
                del made
                raise result
            batch, dropped = result
            yield (_pinned(batch) if self.pin else batch), dropped


class _Batches(Dataset[Made | UserError]):
    """Makes the batch of planned rows. A UserError is returned and not raised, because a DataLoader would turn it into the text
    of a traceback.

    `shards`: the shards whose records are read ahead, and released when their row is made.
    """

    def __init__(self, make: Callable[[list[Row]], Made], shards: HoldsRecords | None = None):
        self.make = make
        self.shards = shards

    def __getitem__(self, planned: Planned) -> Made | UserError:
        s, rows, ahead = planned
        try:
            if self.shards is not None:
                self.shards.hold(ahead)
            batch, dropped = self.make(rows)
            if self.shards is not None:
                self.shards.release(row.index for row in rows)
        except UserError as error:
            return error
        except OSError as error:
            advice = remedy(error)
            if advice is None:
                raise
            return UserError(f"{error.filename or 'the data'}: {error.strerror}; {advice}")
        except MemoryError:
            return UserError(f"there is not enough memory to make a batch; {LESS_MEMORY}")
        if len(batch) == 0:
            names = "; ".join(f"{d.key}: {d.reason}" for d in dropped[:8])
            return UserError(f"no record of batch {s} can be used ({names}); check the data with `vlp data inspect`")
        return batch, dropped


def _pinned(batch: Batch) -> Batch:
    pinned: Batch = _pytree.tree_map_only(Tensor, lambda t: t.pin_memory(), batch)
    return pinned


def _as_is(made: Any) -> Any:
    return made


def _quiet_worker(_: int) -> None:
    # Ctrl-C and SIGTERM are for the main process, which saves and then closes its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
