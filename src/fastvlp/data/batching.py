"""Batches of rows of about one length: little padding, or as many rows as fill a budget of tokens.

The endless shuffled sequence of rows (`Loader`) is cut into buckets; a bucket is sorted by length, cut into batches, and
these are shuffled. With `max_tokens` that is the dynamic batching of UNITER (Chen et al. 2020, arXiv 1909.11740; its
released data/sampler.py), whose running maximum over a bucket is reset here for each batch.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastvlp.errors import UserError
from fastvlp.random import hash64_rows

_SHUFFLE = 1


@dataclass(frozen=True, kw_only=True)
class Grouping:
    """group: rows of a bucket. max_tokens: of a batch on one rank, its rows times its longest, so padding counts; None:
    every batch has the loader's number of rows. multiple: of which the rows of such a batch are, where that many fit.
    reset_longest: False sizes all batches of a bucket by the bucket's longest row, as UNITER's released code does, which
    leaves more than half of the budget unused.

    Rows of one length meet more often than others do: a contrastive loss learns from negatives as long as the positive.
    """

    group: int = 32768
    max_tokens: int | None = None
    multiple: int = 8
    reset_longest: bool = True


@dataclass(frozen=True)
class Lengths:
    """How long each record's rows are: tokens_T of every text that a row may show, those of record i at
    first_N[i]:first_N[i + 1], at least one. int64, `<s>`, `</s>` and whatever else fills the row (regions) included."""

    tokens_T: Tensor
    first_N: Tensor

    def __call__(self, index_B: Tensor, seed_B: Tensor) -> Tensor:
        """int64 [B] of rows (record, seed): a row shows text hash64(seed) % texts, as `PairMaker` does."""
        first_B = self.first_N[index_B]
        return self.tokens_T[first_B + hash64_rows(seed_B) % (self.first_N[index_B + 1] - first_B)]


def budget_sizes(length_N: Tensor, max_tokens: int, *, multiple: int = 8, reset_longest: bool = True) -> list[int]:
    """Rows of the batches that rows sorted from long to short are cut into, none above `max_tokens` = rows * longest.
    The last batch is what remains."""
    sizes: list[int] = []
    at, N = 0, len(length_N)
    while at < N:
        fits = max_tokens // int(length_N[at if reset_longest else 0])
        sizes.append(min(fits - fits % multiple or fits, N - at))
        at += sizes[-1]
    return sizes


def accompanied(sizes: list[int]) -> list[int]:
    """A last row that would be alone takes one from the batch before, where that has more than two: matching and contrast
    have nothing to tell a single row apart from. No budget is exceeded, two being fewer than that batch had."""
    return [*sizes[:-2], sizes[-2] - 1, 2] if sizes[-1:] == [1] and sum(sizes[-2:]) > 3 else sizes


class Plan:
    """Which places of the shuffled sequence make batch number t; rank r's batch s is t = s * world + r.

    Fixed rows: buckets of whole global batches follow each other without a gap, as ungrouped batches do, so that one may
    straddle two epochs; `world` batches that are neighbours in length are shuffled as one, and the ranks keep step.
    With a budget: an epoch is cut into equal buckets, and the last batch of each holds what remains; no more than that
    differs between the ranks' batches, and two ranks take the batches of one with twice the accumulation.

    Batches before t are counted bucket by bucket, once: to resume late costs 0.3 s for each million rows passed over.

    Args:
        lengths: int64 [N] of places [N].
        longest: of any row.
        count, batch_size, world, seed: the loader's.
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
                f"a row has {longest} tokens, and data.max_tokens allows {grouping.max_tokens} a batch; raise it, or lower "
                f"data.max_length"
            )
        self.grouping = grouping
        self.lengths = lengths
        self.count = count
        self.batch_size = batch_size
        self.world = world
        self.seed = seed
        self._first = [0]
        self._last: tuple[int, list[Tensor]] = (-1, [])

    def batch(self, t: int) -> Tensor:
        """Places int64 [B], longest rows first."""
        while self._first[-1] <= t:
            self._first.append(self._first[-1] + len(self.bucket(len(self._first) - 1)))
        b = bisect_right(self._first, t) - 1
        return self.bucket(b)[t - self._first[b]]

    def bucket(self, b: int) -> list[Tensor]:
        """The batches of bucket number b."""
        if self._last[0] != b:
            self._last = (b, self._cut(b))
        return self._last[1]

    def epoch(self) -> float:
        """Batches a rank in an epoch; with a budget in the first one, others differ by which captions they show."""
        if self.grouping.max_tokens is None:
            return self.count / (self.batch_size * self.world)
        return sum(len(self.bucket(b)) for b in range(self._buckets)) / self.world

    @property
    def _buckets(self) -> int:
        """Of an epoch, where there is a budget."""
        return -(-self.count // self.grouping.group)

    def _cut(self, b: int) -> list[Tensor]:
        told = self.grouping
        if told.max_tokens is None:
            whole = self.batch_size * self.world
            rows = max(1, min(told.group, self.count) // whole) * whole
            first, end = b * rows, (b + 1) * rows
        else:
            epoch, part = divmod(b, self._buckets)
            first, end = (epoch * self.count + p * self.count // self._buckets for p in (part, part + 1))
        place_N = torch.arange(first, end)
        length_N, order_N = self.lengths(place_N).sort(descending=True, stable=True)
        place_N = place_N[order_N]
        if told.max_tokens is None:
            batches, together = place_N.split(self.batch_size), self.world
        else:
            sizes = budget_sizes(length_N, told.max_tokens, multiple=told.multiple, reset_longest=told.reset_longest)
            batches, together = place_N.split(accompanied(sizes)), 1
        blocks = [batches[i : i + together] for i in range(0, len(batches), together)]
        order = hash64_rows(self.seed, _SHUFFLE, b, torch.arange(len(blocks))).argsort()
        return [batch for i in order.tolist() for batch in blocks[i]]
