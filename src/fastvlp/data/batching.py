"""Makes batches of rows of similar length: with little padding, or with as many rows as fit into a token budget.

The endless shuffled sequence of rows (`Loader`) is cut into buckets; each bucket is sorted by length and cut into batches,
and its batches are shuffled. With `max_tokens` that is the dynamic batching of UNITER (Chen et al. 2020, arXiv 1909.11740;
released code: data/sampler.py), except that the running maximum of a bucket is reset here for each batch.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from fastvlp.errors import UserError
from fastvlp.random import hash64_rows

_SHUFFLE = 1


@dataclass(frozen=True, kw_only=True)
class Grouping:
    """The options of grouping rows by length. Rows of the same length are in the same batch more often, so that most negatives
    of a contrastive loss have the length of the positive.

    Attributes:
        group: number of rows of a bucket.
        max_tokens: budget of a batch on one rank: its number of rows times its longest row, so that padding counts. None:
            every batch has the loader's number of rows.
        multiple: a batch with a budget has a multiple of this number of rows, if that many fit.
        reset_longest: False sizes all batches of a bucket by the bucket's longest row, as UNITER's released code does, which
            leaves more than half of the budget unused.
    """

    group: int = 32768
    max_tokens: int | None = None
    multiple: int = 8
    reset_longest: bool = True


@dataclass(frozen=True)
class Lengths:
    """The lengths of rows, of any type of integers; they may be mapped from a file.

    Attributes:
        tokens_T: for each text of each record, the number of tokens of its row, including `<s>`, `</s>` and everything else in
            the row (regions).
        first_N: the texts of record i are those from first_N[i] to first_N[i + 1], at least one.
    """

    tokens_T: np.ndarray
    first_N: np.ndarray

    def __call__(self, index_B: Tensor, seed_B: Tensor) -> Tensor:
        """Returns the lengths int64 [B] of rows with these records and seeds. A row has the text hash64(seed) % texts, as in
        `PairMaker`."""
        index = index_B.numpy()
        first = self.first_N[index].astype(np.int64)
        texts = self.first_N[index + 1].astype(np.int64) - first
        return torch.from_numpy(self.tokens_T[first + hash64_rows(seed_B).numpy() % texts].astype(np.int64))


def budget_sizes(length_N: Tensor, max_tokens: int, *, multiple: int = 8, reset_longest: bool = True) -> list[int]:
    """Cuts rows, sorted from long to short, into batches whose rows * longest is at most `max_tokens`. Returns their numbers
    of rows; the last batch has what remains."""
    sizes: list[int] = []
    at, N = 0, len(length_N)
    while at < N:
        fits = max_tokens // int(length_N[at if reset_longest else 0])
        sizes.append(min(fits - fits % multiple or fits, N - at))
        at += sizes[-1]
    return sizes


def avoid_single_row(sizes: list[int]) -> list[int]:
    """If the last batch has one row and the batch before it more than two, moves a row to the last one: matching and
    contrastive losses need a second row. This cannot exceed the budget, since two rows are fewer than that batch had."""
    return [*sizes[:-2], sizes[-2] - 1, 2] if sizes[-1:] == [1] and sum(sizes[-2:]) > 3 else sizes


class Plan:
    """Computes the places, in the shuffled sequence of rows, of batch number t. Batch s of rank r has t = s * world + r.

    With a fixed number of rows, buckets consist of whole global batches, so that a bucket may contain the end of one epoch and
    the beginning of the next. Groups of `world` batches with neighbouring lengths are shuffled together, so that all ranks have
    rows of similar length in a step.

    With a budget, an epoch is cut into equal buckets, and the last batch of each bucket has what remains. Two ranks take the
    batches that one rank would take with twice the accumulation.

    With a budget, batches before t are counted bucket by bucket, once: resuming costs 0.3 s for each million rows before it.

    Args:
        lengths: the lengths int64 [N] of the rows at places [N].
        longest: the longest of all rows.
        count, batch_size, world, seed: as the loader's.
    """

    def __init__(
        self,
        grouping: Grouping,
        lengths: Callable[[Tensor], Tensor],
        longest: int,
        *,
        count: int,
        batch_size: int,
        world: int,
        seed: int,
    ):
        if grouping.max_tokens is not None and longest > grouping.max_tokens:
            raise UserError(
                f"a row has {longest} tokens, and `data.max_tokens` allows {grouping.max_tokens} a batch; raise it, or lower "
                f"`data.max_length`"
            )
        self.grouping = grouping
        self.lengths = lengths
        self.count = count
        self.batch_size = batch_size
        self.world = world
        self.seed = seed
        # A thread of the loader asks for batches while the main thread saves its place.
        self._lock = threading.RLock()
        self._first = [0]
        self._last: tuple[int, list[Tensor]] = (-1, [])

    def batch(self, t: int) -> Tensor:
        """Returns the places int64 [B] of a batch, longest rows first."""
        with self._lock:
            b = self._bucket_of(t)
            return self.bucket(b)[t - self._first_of(b)]

    def place(self, t: int) -> int:
        """Returns the number of rows before batch number t."""
        with self._lock:
            if self.grouping.max_tokens is None:
                return t * self.batch_size
            b = self._bucket_of(t)
            return self._range(b)[0] + sum(map(len, self.bucket(b)[: t - self._first_of(b)]))

    def _bucket_of(self, t: int) -> int:
        """Returns the bucket of batch number t. The caller holds the lock."""
        if self.grouping.max_tokens is None:
            first, end = self._range(0)
            return t * self.batch_size // (end - first)
        while self._first[-1] <= t:
            self._first.append(self._first[-1] + len(self.bucket(len(self._first) - 1)))
        return bisect_right(self._first, t) - 1

    def _first_of(self, b: int) -> int:
        """Returns the number of the first batch of a bucket that was already counted."""
        return self._range(b)[0] // self.batch_size if self.grouping.max_tokens is None else self._first[b]

    def batch_behind(self, place: int) -> int:
        """Returns the number of the first batch that begins after this number of rows."""
        if self.grouping.max_tokens is None:
            return -(-place // self.batch_size)
        b = 0
        while self._range(b)[1] <= place:
            b += 1
        t = sum(len(self.bucket(i)) for i in range(b))
        return t + next(n for n, before in enumerate(self._before(b)) if self._range(b)[0] + before >= place)

    def _before(self, b: int) -> list[int]:
        """Returns the number of rows of a bucket before each of its batches, and after the last one."""
        return [0, *accumulate(map(len, self.bucket(b)))]

    def bucket(self, b: int) -> list[Tensor]:
        """Returns the batches of bucket number b."""
        with self._lock:
            if self._last[0] != b:
                self._last = (b, self._cut(b))
            return self._last[1]

    def epoch(self) -> float:
        """Returns the number of batches of a rank in an epoch. With a token budget this is the first epoch, since other epochs
        have other captions and lengths."""
        if self.grouping.max_tokens is None:
            return self.count / (self.batch_size * self.world)
        return sum(len(self.bucket(b)) for b in range(self._buckets)) / self.world

    @property
    def _buckets(self) -> int:
        """The number of buckets of an epoch, with a token budget."""
        return -(-self.count // self.grouping.group)

    def _range(self, b: int) -> tuple[int, int]:
        """Returns the places of the rows of a bucket: the first one, and the one after the last."""
        if self.grouping.max_tokens is None:
            whole = self.batch_size * self.world
            rows = max(1, min(self.grouping.group, self.count) // whole) * whole
            return b * rows, (b + 1) * rows
        epoch, part = divmod(b, self._buckets)
        first, end = (epoch * self.count + p * self.count // self._buckets for p in (part, part + 1))
        return first, end

    def _cut(self, b: int) -> list[Tensor]:
        grouping = self.grouping
        place_N = torch.arange(*self._range(b))
        length_N, order_N = self.lengths(place_N).sort(descending=True, stable=True)
        place_N = place_N[order_N]
        if grouping.max_tokens is None:
            batches, together = place_N.split(self.batch_size), self.world
        else:
            sizes = budget_sizes(
                length_N, grouping.max_tokens, multiple=grouping.multiple, reset_longest=grouping.reset_longest
            )
            batches, together = place_N.split(avoid_single_row(sizes)), 1
        blocks = [batches[i : i + together] for i in range(0, len(batches), together)]
        order = hash64_rows(self.seed, _SHUFFLE, b, torch.arange(len(blocks))).argsort()
        return [batch for i in order.tolist() for batch in blocks[i]]
