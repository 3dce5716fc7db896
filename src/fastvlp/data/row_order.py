"""The order of records in the endless sequence of epochs: shuffled, or mixed from several data sets in given shares."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from fastvlp.random import hash64

_SLOT, _SOURCE = 4, 5


class RowOrder(Protocol):
    """A function of the place in the sequence alone, so that a resumed run goes on where it stopped."""

    def rows(self, place_N: Tensor) -> tuple[Tensor, Tensor]:
        """The record of the row at each place, and in which epoch of its data set it is shown: int64 [N] each."""


class ShuffledOrder:
    """An order with each record once in an epoch, and a different order in each epoch.

    Args:
        count: number of records.
        salts: decide the orders; the first is a run's seed.
    """

    def __init__(self, count: int, *salts: int):
        self.count = count
        self.salts = salts
        self._orders: dict[int, Tensor] = {}

    def rows(self, place_N: Tensor) -> tuple[Tensor, Tensor]:
        epoch_N = place_N // self.count
        index_N = torch.empty_like(place_N)
        for epoch in sorted({*epoch_N.tolist()}):
            here_N = epoch_N == epoch
            index_N[here_N] = self.order(epoch)[place_N[here_N] % self.count].long()
        return index_N, epoch_N

    def order(self, epoch: int) -> Tensor:
        """The records of an epoch [count], of 4 bytes each: 10 M take 40 MB."""
        order = self._orders.get(epoch)
        if order is None:
            generator = torch.Generator().manual_seed(hash64(*self.salts, epoch))
            dtype = torch.int32 if self.count < 2**31 else torch.int64
            order = torch.randperm(self.count, generator=generator, dtype=dtype)
            self._orders = {e: o for e, o in self._orders.items() if e == epoch - 1} | {epoch: order}
        return order


class Mixture(NamedTuple):
    """Data sets that are mixed: their numbers of records, and their shares of the rows of an epoch, which add up to 1. Their
    records are numbered one data set after the other."""

    sizes: tuple[int, ...]
    shares: tuple[float, ...]


class MixedOrder:
    """Rows of several data sets. An epoch has as many rows as there are records, and each data set its exact share of them, to
    a row, spread over the epoch at random. Each data set is shown whole before any of its records comes again: it has epochs of
    its own, shorter or longer than those of the whole."""

    def __init__(self, mixture: Mixture, seed: int):
        self.mixture = mixture
        self.count = sum(mixture.sizes)
        self.rows_S = exact_rows(mixture.shares, self.count)
        self._slots = ShuffledOrder(self.count, seed, _SLOT)
        self._sources = [ShuffledOrder(size, seed, _SOURCE, s) for s, size in enumerate(mixture.sizes)]
        self._known: dict[int, tuple[Tensor, Tensor]] = {}

    def rows(self, place_N: Tensor) -> tuple[Tensor, Tensor]:
        index_N, epoch_of_N = torch.empty_like(place_N), torch.empty_like(place_N)
        epoch_N = place_N // self.count
        for epoch in sorted({*epoch_N.tolist()}):
            source_P, before_P = self._epoch(epoch)
            at_N = torch.nonzero(epoch_N == epoch)[:, 0]
            place = place_N[at_N] % self.count
            first = 0
            for s, (order, rows) in enumerate(zip(self._sources, self.rows_S)):
                here = source_P[place] == s
                if here.any():
                    own, shown = order.rows(epoch * rows + before_P[place[here]].long())
                    index_N[at_N[here]], epoch_of_N[at_N[here]] = first + own, shown
                first += order.count
        return index_N, epoch_of_N

    def _epoch(self, epoch: int) -> tuple[Tensor, Tensor]:
        """Returns, for each position in an epoch, its data set and the number of earlier rows of that data set in the epoch."""
        if epoch not in self._known:
            slot_P = self._slots.order(epoch)
            source_P = torch.zeros(self.count, dtype=torch.int16)
            before_P = torch.empty_like(slot_P)
            end = 0
            for s, rows in enumerate(self.rows_S):
                here_P = (slot_P >= end) & (slot_P < end + rows)
                source_P[here_P] = s
                before_P[here_P] = torch.arange(rows, dtype=slot_P.dtype)
                end += rows
            kept = {e: known for e, known in self._known.items() if e == epoch - 1}
            self._known = kept | {epoch: (source_P, before_P)}
        return self._known[epoch]


def exact_rows(shares: Sequence[float], count: int) -> list[int]:
    """Cuts `count` rows in these shares: each gets the whole rows of its share, and those that are left go to the largest
    remainders."""
    exact = [share * count for share in shares]
    rows = [int(part) for part in exact]
    by_remainder = sorted(range(len(rows)), key=lambda s: (rows[s] - exact[s], s))
    for s in by_remainder[: count - sum(rows)]:
        rows[s] += 1
    return rows
