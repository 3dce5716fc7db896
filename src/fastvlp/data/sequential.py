"""The order of rows that are read sequentially, shard after shard, and shuffled in a buffer. It is for remote data, where each
request takes a while.

Each epoch has another order of shards, and reads the records of a shard in the order in which they are stored. This sequence is
cut into one part for each stream, `streams` of each rank. A stream passes through a buffer. Each row is a record that is drawn
from the buffer at random; the next record of the sequence takes its place. Batch s of a rank is made of its stream s % streams.
So if there are as many loader processes as streams, which take turns, each of them reads its own part.

Shards, parts and draws are functions of the seed, the epoch and the place, and do not depend on earlier reads. So the rows of
batch number s, and the records that are then in the buffer, are known without reading anything. A resumed run reads the buffer
again, and continues as if it had not stopped.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from fastvlp.random import hash64_rows

_SHARDS, _DRAW, _REST = 1, 2, 3
# Number of bytes of records that are read at a time.
BLOCK = 4 << 20


class HoldsRecords(Protocol):
    """Records that can be read ahead (`Shards`)."""

    def hold(self, records: Iterable[int]) -> None: ...

    def release(self, records: Iterable[int]) -> None: ...


@dataclass(frozen=True, kw_only=True)
class SequentialReading:
    """The options of reading records in the order in which they are stored.

    Attributes:
        shards: reads records ahead.
        sizes: number of records of each shard.
        buffer: number of records that are kept in the memory of each rank.
        streams: number of parts of an epoch that a rank reads at the same time.
        block: number of records that are read at a time.
    """

    shards: HoldsRecords
    sizes: Sequence[int]
    buffer: int
    streams: int = 1
    block: int = 1


class Stream(NamedTuple):
    """A stream in one epoch: its records in the order in which they are stored, and the place of each row among them."""

    stored_N: Tensor
    drawn_N: Tensor


def through_buffer(count: int, buffer: int, seed: int, epoch: int, stream: int) -> Tensor:
    """Returns the places int64 [count] in a sequence, in the order in which its items leave a buffer of this size. Item number
    p + buffer enters when row p leaves. When no items are left to enter, the rest leaves in random order."""
    size = min(buffer, count)
    if not size:
        return torch.empty(0, dtype=torch.int64)
    p = torch.arange(count - size)
    slot_P = hash64_rows(seed, _DRAW, epoch, stream, p) % size
    # The item that leaves a slot is the one that entered it last: when the previous row left this slot, or at the beginning.
    by_slot_P = slot_P.argsort(stable=True)
    sorted_P = slot_P[by_slot_P]
    is_same = sorted_P[1:] == sorted_P[:-1]
    left_P, last_S = slot_P.clone(), torch.arange(size)
    left_P[by_slot_P[1:][is_same]] = size + by_slot_P[:-1][is_same]
    ends = torch.cat([~is_same, is_same.new_ones(len(p[:1]))])
    last_S[sorted_P[ends]] = size + by_slot_P[ends]
    rest_S = hash64_rows(seed, _REST, epoch, stream, torch.arange(size)).argsort()
    return torch.cat([left_P, last_S[rest_S]])


class SequentialOrder:
    """The order of records in an endless sequence of epochs that are read sequentially.

    Args:
        count, batch_size, world, seed: as the loader's, whose places these are.
    """

    def __init__(self, reading: SequentialReading, *, count: int, batch_size: int, world: int, seed: int):
        self.reading = reading
        self.count = count
        self.batch_size = batch_size
        self.seed = seed
        self.streams = world * reading.streams
        # No stream has more rows in an epoch. A larger buffer would be filled with records of later epochs.
        longest = (count // (batch_size * self.streams) + 1) * batch_size
        self.buffer = min(max(1, reading.buffer // reading.streams), longest)
        self._first_T = torch.tensor([0, *reading.sizes]).cumsum(0)
        self._known: dict[tuple[int, int], Stream] = {}

    def rows(self, place_N: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the record of the row at each place, and its epoch: int64 [N] each."""
        return self.index(place_N), place_N // self.count

    def index(self, place_N: Tensor) -> Tensor:
        """Returns the record int64 [N] of the row at each place."""
        index_N = torch.empty_like(place_N)
        epoch_N, stream_N = place_N // self.count, place_N // self.batch_size % self.streams
        for epoch, v in {*zip(epoch_N.tolist(), stream_N.tolist())}:
            here_N = (epoch_N == epoch) & (stream_N == v)
            row_N = self._rows_before(place_N[here_N], v) - self._begin(epoch, v)
            stream = self.stream(epoch, v)
            index_N[here_N] = stream.stored_N[stream.drawn_N[row_N]]
        return index_N

    def stream(self, epoch: int, v: int) -> Stream:
        """Returns stream number v of all ranks in an epoch."""
        if (epoch, v) not in self._known:
            self._known = {key: known for key, known in self._known.items() if key[0] >= epoch - 1}
            stored_N = self._stored(epoch, v)
            drawn_N = through_buffer(len(stored_N), self.buffer, self.seed, epoch, v)
            self._known[epoch, v] = Stream(stored_N, drawn_N)
        return self._known[epoch, v]

    def _stored(self, epoch: int, v: int) -> Tensor:
        sizes_T = self._first_T.diff()
        order_T = hash64_rows(self.seed, _SHARDS, epoch, torch.arange(len(sizes_T))).argsort()
        end_T = sizes_T[order_T].cumsum(0)
        first = sum(self._begin(epoch + 1, u) - self._begin(epoch, u) for u in range(v))
        place_N = torch.arange(first, first + self._begin(epoch + 1, v) - self._begin(epoch, v))
        t = torch.searchsorted(end_T, place_N, right=True)
        return self._first_T[order_T[t]] + place_N - (end_T - sizes_T[order_T])[t]

    def _begin(self, epoch: int, v: int) -> int:
        """Returns the number of rows of a stream before an epoch."""
        return int(self._rows_before(torch.tensor(epoch * self.count), v))

    def _rows_before(self, place: Tensor, v: int) -> Tensor:
        """Returns the number of rows of a stream before a place."""
        turn = self.batch_size * self.streams
        return place // turn * self.batch_size + (place % turn - v * self.batch_size).clamp(0, self.batch_size)

    def epoch_of(self, row: int, v: int) -> int:
        """Returns the epoch of a row of a stream."""
        turn, b = divmod(row, self.batch_size)
        return ((turn * self.streams + v) * self.batch_size + b) // self.count

    def waiting(self, row: int, v: int) -> tuple[list[int], int]:
        """Returns the records of the epoch that are in the buffer when a row is drawn, and the number, within the stream, of
        the first record that is not read yet."""
        epoch = self.epoch_of(row, v)
        begin, stream = self._begin(epoch, v), self.stream(epoch, v)
        end = min(row - begin + self.buffer, len(stream.stored_N))
        waits_N = torch.arange(len(stream.stored_N)) < end
        waits_N[stream.drawn_N[: row - begin]] = False
        return stream.stored_N[waits_N].tolist(), begin + end

    def stored_from(self, row: int, v: int) -> list[int]:
        """Returns the next block of records of a stream: at most `block`, all of one epoch."""
        epoch = self.epoch_of(row, v)
        place = row - self._begin(epoch, v)
        block: list[int] = self.stream(epoch, v).stored_N[place : place + self.reading.block].tolist()
        return block


class ReadAhead:
    """The records that a rank reads before each of its batches. Each call is for the next batch."""

    def __init__(self, order: SequentialOrder):
        self._order = order
        self._read: dict[int, int] = {}

    def before(self, t: int) -> list[int]:
        """Returns the records that enter the buffer for batch number t of all ranks; for the first batch of a stream, all
        records in the buffer."""
        order = self._order
        entering: list[int] = []
        turn, v = divmod(t, order.streams)
        row = turn * order.batch_size
        if v not in self._read:
            entering, self._read[v] = order.waiting(row, v)
        while self._read[v] < row + order.batch_size + order.buffer:
            block = order.stored_from(self._read[v], v)
            entering += block
            self._read[v] += len(block)
        return entering
