"""Several sets of shards as one: their records are numbered one set after the other."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from hashlib import sha256
from itertools import accumulate, groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, TypeVar

from fastvlp.batch import Dropped
from fastvlp.data.records.interface import SplitRecords
from fastvlp.data.records.shards import RecordError, Shards

T = TypeVar("T")


class JoinedShards:
    """The records of several `Shards`. Files about them are kept beside the first. Picklable."""

    def __init__(self, parts: Sequence[Shards]):
        self.parts = parts
        self._first = [0, *accumulate(map(len, parts))]

    def __len__(self) -> int:
        return self._first[-1]

    @property
    def url(self) -> str:
        return " + ".join(part.url for part in self.parts)

    @property
    def damage(self) -> list[Dropped]:
        return [Dropped(key=f"{part.url}: {one.key}", reason=one.reason) for part in self.parts for one in part.damage]

    @property
    def fingerprint(self) -> str:
        return _hash([part.fingerprint for part in self.parts])

    @property
    def content(self) -> str:
        return _hash([part.content for part in self.parts])

    @property
    def folder(self) -> Path | None:
        return self.parts[0].folder

    def places(self, name: str) -> list[Path]:
        return self.parts[0].places(name)

    def key(self, i: int) -> str:
        """The key in its own set, with the place of that set where it is not the first: two sets may use the same keys."""
        part, own = self._part(i)
        key = part.key(own)
        return key if part is self.parts[0] else f"{part.url}: {key}"

    def info(self, i: int) -> dict[str, Any]:
        return self._read(Shards.info, i)

    def images(self, i: int) -> tuple[bytes, ...]:
        return self._read(Shards.images, i)

    def image_count(self, i: int) -> int:
        return self._read(Shards.image_count, i)

    def detected(self, i: int) -> tuple[bytes, ...]:
        return self._read(Shards.detected, i)

    def hold(self, records: Iterable[int]) -> None:
        for part, own in self._by_part(records):
            part.hold(own)

    def release(self, records: Iterable[int]) -> None:
        for part, own in self._by_part(records):
            part.release(own)

    def _by_part(self, records: Iterable[int]) -> Iterator[tuple[Shards, list[int]]]:
        """Neighbours of one part together, as it reads them in one go."""
        for s, placed in groupby(map(self._place, records), itemgetter(0)):
            yield self.parts[s], [own for _, own in placed]

    def _read(self, method: Callable[[Shards, int], T], i: int) -> T:
        part, own = self._part(i)
        try:
            return method(part, own)
        except RecordError as error:
            raise RecordError(self.key(i), error.reason) from error

    def _part(self, i: int) -> tuple[Shards, int]:
        """The shards that have record i, and its number in them."""
        s, own = self._place(i)
        return self.parts[s], own

    def _place(self, i: int) -> tuple[int, int]:
        if not 0 <= i < len(self):
            raise IndexError(f"record {i} of {len(self)} in {self.url}")
        s = bisect_right(self._first, i) - 1
        return s, i - self._first[s]


def joined(parts: Sequence[Shards]) -> SplitRecords:
    """The parts as one; a single one as it is."""
    return parts[0] if len(parts) == 1 else JoinedShards(parts)


def _hash(texts: Sequence[str]) -> str:
    return sha256("\n".join(texts).encode()).hexdigest()
