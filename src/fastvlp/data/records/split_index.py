"""The index of all tars of a split: where each member of each record is, as flat arrays in one memory-mapped file."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fastvlp.batch import Dropped
from fastvlp.data.flat_arrays import DamagedArraysError, FlatArrays, FlatWriter, open_flat
from fastvlp.data.records.held_members import HeldMembers, Place
from fastvlp.data.records.tar_index import KINDS, TarIndex
from fastvlp.files import MOST_BYTES

VERSION = 5
# The arrays of a file and their types; an offset has 4 bytes where no tar is larger than these can say.
_ARRAYS = {
    "tar_size": "<i8",
    "tar_mtime_ns": "<i8",
    "tar_records": "<i8",
    "tar_members": "<i8",
    "tar_keys": "<i8",
    "first": "<u4",
    "key": "<u4",
    "kind": "u1",
    "length": "<u4",
    "offset": "<u4",
    "keys": "u1",
}
# Members that are checked at a time.
_BLOCK = 1 << 20
# Records of which all is read for a content's hash.
_SAMPLES = 8


class Tar(NamedTuple):
    """A tar as it is now.

    Attributes:
        place: path, or place in a file system at a URL.
        size: bytes.
        mtime_ns: when it was last changed; None at a URL, where uploading changes it.
    """

    place: str
    size: int
    mtime_ns: int | None

    @property
    def name(self) -> str:
        return Path(self.place).name


class Member(NamedTuple):
    """A part of a record: its kind, and where its content is in the tar."""

    kind: str
    offset: int
    length: int


class SplitIndex:
    """The index of T tars with R records and M members in all.

    Attributes:
        names: of the tars.
        tar_size, tar_mtime_ns: int64 [T], when the index was made.
        tar_records, tar_members, tar_keys: int64 [T + 1], how many records, members and bytes of keys are before each tar.
        first, key, kind, length, offset, keys: those of each tar's `TarIndex`, one tar after the other.
        fingerprint: hash of the tars' names, sizes and times, and of what the index says of them.
        content: hash of the records in their order, wherever they are and whenever they were written: of all keys, sizes and
            kinds of members, and of all that a few records hold.
        damage: what cannot be read of each tar, with the number of the tar.
    """

    def __init__(self, flat: FlatArrays):
        about = flat.about
        self.names: list[str] = about["tars"]
        self.fingerprint: str = about["fingerprint"]
        self.content: str = about["content"]
        self.origin: str = about["origin"]
        self.damage = [(int(t), Dropped(**part)) for t, part in about["damage"]]
        (self.tar_size, self.tar_mtime_ns, self.tar_records, self.tar_members, self.tar_keys, self.first, self.key,
         self.kind, self.length, self.offset, self.keys) = (flat.arrays[name] for name in _ARRAYS)  # fmt: skip
        self._starts: list[int] = self.tar_records.tolist()
        self.count = self._starts[-1]

    def __len__(self) -> int:
        return self.count

    @property
    def sizes(self) -> list[int]:
        """The number of records in each tar."""
        return [end - begin for begin, end in pairwise(self._starts)]

    def tar_of(self, i: int) -> int:
        """The number of the tar that has record i."""
        return bisect_right(self._starts, i) - 1

    def members(self, i: int) -> tuple[int, list[Member]]:
        """The number of record i's tar, and its members in it: images in order, texts, regions."""
        t = bisect_right(self._starts, i) - 1
        # A tar has one entry more than records in `first`.
        base = int(self.tar_members[t])
        begin, end = base + int(self.first[i + t]), base + int(self.first[i + t + 1])
        kinds, offsets = self.kind[begin:end].tolist(), self.offset[begin:end].tolist()
        lengths = self.length[begin:end].tolist()
        return t, [Member(KINDS[kind], offset, length) for kind, offset, length in zip(kinds, offsets, lengths)]

    def key_of(self, i: int) -> str:
        t = self.tar_of(i)
        base = int(self.tar_keys[t])
        return _text(self.keys[base + int(self.key[i + t]) : base + int(self.key[i + t + 1]) - 1])

    def all_keys(self) -> list[str]:
        return _text(self.keys[:-1]).split("\n") if len(self) else []

    def tar(self, t: int) -> TarIndex:
        """The index of one tar."""
        r0, r1 = self._starts[t] + t, self._starts[t + 1] + t + 1
        m0, m1 = int(self.tar_members[t]), int(self.tar_members[t + 1])
        k0, k1 = int(self.tar_keys[t]), int(self.tar_keys[t + 1])
        return TarIndex(
            first=self.first[r0:r1],
            key=self.key[r0:r1],
            kind=self.kind[m0:m1],
            offset=self.offset[m0:m1].astype(np.int64),
            length=self.length[m0:m1],
            keys=self.keys[k0:k1],
            damage=[part for number, part in self.damage if number == t],
        )

    def is_of(self, tars: Sequence[Tar]) -> bool:
        """Whether it is the index of these tars."""
        return (
            self.names == [tar.name for tar in tars]
            and self.tar_size.tolist() == [tar.size for tar in tars]
            and all(tar.mtime_ns in (None, time) for tar, time in zip(tars, self.tar_mtime_ns.tolist()))
        )


def read_split_index(path: Path, *, check: bool = True) -> SplitIndex:
    """Opens the index in a file. Raises DamagedArraysError if it is not one of this version, not what was written, or names
    places outside its tars; and OSError if it cannot be read.

    Args:
        check: False if this process has checked the file already.
    """
    flat = open_flat(path, check=check)
    try:
        if flat.about["version"] != VERSION:
            raise DamagedArraysError("it is of another version")
        types = {name: array.dtype.str.replace("|", "") for name, array in flat.arrays.items()}
        if types not in (_ARRAYS, {**_ARRAYS, "offset": "<i8"}):
            raise DamagedArraysError("it has other arrays")
        texts = [*flat.about["tars"], flat.about["fingerprint"], flat.about["content"], flat.about["origin"]]
        if not all(isinstance(text, str) for text in texts):
            raise DamagedArraysError("its texts are none")
        _check_shape(flat.arrays, len(flat.about["tars"]))
        index = SplitIndex(flat)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise DamagedArraysError(f"its header cannot be read ({error})") from error
    if check and not all(_is_sound(index, first, end) for first, end in _blocks(index)):
        raise DamagedArraysError("it names places outside its tars")
    return index


def _check_shape(arrays: Mapping[str, np.ndarray], T: int) -> None:
    """The checksum shows damage; this, and `_is_sound`, show what was made with intent."""
    R, M, K = (int(arrays[name][-1]) for name in ("tar_records", "tar_members", "tar_keys"))
    counts = {"tar_size": T, "tar_mtime_ns": T, "tar_records": T + 1, "tar_members": T + 1, "tar_keys": T + 1}
    counts |= {"first": R + T, "key": R + T, "kind": M, "length": M, "offset": M, "keys": K}
    rising = all(
        starts[0] == 0 and (np.diff(starts) >= 0).all()
        for starts in (arrays[name] for name in ("tar_records", "tar_members", "tar_keys"))
    )
    if not rising or any(len(arrays[name]) != count for name, count in counts.items()):
        raise DamagedArraysError("its arrays have other sizes")


def _blocks(index: SplitIndex) -> Iterator[tuple[int, int]]:
    """Spans of tars of about `_BLOCK` members each, or of one tar that has more."""
    t, T = 0, len(index.names)
    while t < T:
        end = int(np.searchsorted(index.tar_members, index.tar_members[t] + _BLOCK, side="right")) - 1
        yield t, (t := min(T, max(t + 1, end)))


def _is_sound(index: SplitIndex, t: int, end: int) -> bool:
    """Whether the records of the tars t to end have members, which lie within their tar, and keys."""
    records, span = index.tar_records[t : end + 1], np.arange(t, end)
    begin_T, end_T = records[:-1] + span, records[1:] + span
    for starts, totals in ((index.first, index.tar_members), (index.key, index.tar_keys)):
        part = starts[int(begin_T[0]) : int(end_T[-1]) + 1].astype(np.int64)
        steps = np.diff(part)
        steps[end_T[:-1] - begin_T[0]] = 1  # from one tar to the next
        whole = part[end_T - begin_T[0]] == np.diff(totals[t : end + 1])
        if not ((part[begin_T - begin_T[0]] == 0).all() and whole.all() and (steps > 0).all()):
            return False
    m0, m1 = int(index.tar_members[t]), int(index.tar_members[end])
    size = np.repeat(index.tar_size[t:end], np.diff(index.tar_members[t : end + 1]))
    offset, length = index.offset[m0:m1].astype(np.int64), index.length[m0:m1]
    inside = (offset >= 0) & (length <= size - offset) & (length <= MOST_BYTES)
    return bool((inside & (index.kind[m0:m1] < len(KINDS))).all())


def write_split_index(
    file: int,
    folder: Path,
    tars: Sequence[Tar],
    indexes: Iterator[tuple[int, TarIndex]],
    read: Callable[[str, int, int], bytes],
    origin: str = "",
) -> None:
    """Writes the index of a split into an open file. Raises OSError if the disk is full.

    Args:
        folder: of its parts while they grow.
        indexes: the time and the index of each tar, in their order.
        read: reads bytes of a tar, given its place, an offset and a number.
        origin: what the index was made of, where its reader wants to know.
    """
    offset = "<i8" if any(tar.size > np.iinfo(np.uint32).max for tar in tars) else "<u4"
    fingerprint, damage = hashlib.sha256(), []
    totals = {"first": [0], "kind": [0], "keys": [0]}
    with closing(FlatWriter({**_ARRAYS, "offset": offset}, folder)) as writer:
        for t, (tar, (mtime_ns, index)) in enumerate(zip(tars, indexes)):
            for name in ("first", "key", "kind", "length", "offset", "keys"):
                writer.add(name, getattr(index, name))
            writer.add("tar_size", [tar.size])
            writer.add("tar_mtime_ns", [mtime_ns])
            for name, added in (("first", len(index.first) - 1), ("kind", len(index.kind)), ("keys", len(index.keys))):
                totals[name].append(totals[name][-1] + added)
            damage += [(t, asdict(part)) for part in index.damage]
            fingerprint.update(f"{tar.name} {tar.size} {mtime_ns} {len(index.first) - 1}\n".encode())
            fingerprint.update(index.keys[:-1].tobytes())
            for part in (index.first, index.offset, index.length):
                fingerprint.update(part.astype("<i8").tobytes())
        for name, starts in (("tar_records", "first"), ("tar_members", "kind"), ("tar_keys", "keys")):
            writer.add(name, totals[starts])
        about = {
            "version": VERSION,
            "tars": [tar.name for tar in tars],
            "damage": damage,
            "fingerprint": fingerprint.hexdigest(),
            "origin": origin,
        }
        written = SplitIndex(FlatArrays(writer.arrays(), {**about, "content": ""}))
        about["content"] = _content(written, tars, read)
        writer.save(file, about)


def _content(index: SplitIndex, tars: Sequence[Tar], read: Callable[[str, int, int], bytes]) -> str:
    """The hash that `SplitIndex.content` is."""
    digest = hashlib.sha256()
    for part in _pieces(index.keys[:-1]):
        digest.update(part.tobytes())
    for t in range(len(tars)):
        begin = int(index.tar_records[t]) + t
        digest.update(np.diff(index.first[begin : int(index.tar_records[t + 1]) + t + 1].astype("<i8")).tobytes())
    for part in _pieces(index.kind):
        digest.update(part.tobytes())
    for part in _pieces(index.length):
        digest.update(part.astype("<i8").tobytes())
    for i in range(0, len(index), max(1, -(-len(index) // _SAMPLES))):
        t, members = index.members(i)
        places = [Place(tars[t].place, member.offset, member.length) for member in members]
        held = HeldMembers()
        # Neighbours in one read, which takes a while from a store far away.
        held.add(places, read)
        for place in places:
            digest.update(held.get(place) or b"")
    return digest.hexdigest()


def _pieces(array: np.ndarray) -> Iterator[np.ndarray]:
    return (array[first : first + _BLOCK] for first in range(0, len(array), _BLOCK))


def _text(key: np.ndarray) -> str:
    return key.tobytes().decode("utf-8", "backslashreplace")
