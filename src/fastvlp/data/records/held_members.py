"""Members of tars that were read ahead: whole records in few long reads, kept until they were used."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

# Bytes between two records that are read in vain rather than begin another read, and bytes of a read at most.
GAP, LONGEST = 256 << 10, 16 << 20


class Place(NamedTuple):
    """The position of a member in a tar."""

    tar: str
    offset: int
    length: int


class HeldMembers:
    """The contents of members, each for as many uses as it was read ahead for."""

    def __init__(self) -> None:
        self._data: dict[Place, bytes] = {}
        self._uses: dict[Place, int] = {}

    def __len__(self) -> int:
        return len(self._data)

    def get(self, member: Place) -> bytes | None:
        return self._data.get(member)

    def add(self, members: Iterable[Place], read: Callable[[str, int, int], bytes]) -> None:
        """Reads members that are not held, and counts a use of each. `read`: tar, offset and length -> bytes."""
        members = list(members)
        missing = {member for member in members if member not in self._data}
        for span in spans(sorted(missing)):
            tar, first, _ = span[0]
            data = read(tar, first, span[-1].offset + span[-1].length - first)
            for member in span:
                self._data[member] = data[member.offset - first : member.offset - first + member.length]
        for member in members:
            self._uses[member] = self._uses.get(member, 0) + 1

    def release(self, members: Iterable[Place]) -> None:
        """One use of each is over."""
        for member in members:
            uses = self._uses.pop(member, 0) - 1
            if uses > 0:
                self._uses[member] = uses
            else:
                self._data.pop(member, None)


def spans(members: Sequence[Place]) -> Iterator[list[Place]]:
    """Members in the order of their tars, in groups that are read at once."""
    for _, group in groupby(members, key=lambda member: member.tar):
        span: list[Place] = []
        for member in group:
            if span:
                end = span[-1].offset + span[-1].length
                if member.offset - end > GAP or member.offset + member.length - span[0].offset > LONGEST:
                    yield span
                    span = []
            span.append(member)
        if span:
            yield span
