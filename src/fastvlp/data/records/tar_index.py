"""The index of a tar, its members and their places, read from its headers."""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass, field
from itertools import groupby
from typing import IO

import numpy as np

from fastvlp.batch import Dropped
from fastvlp.data.records import tar_members
from fastvlp.data.records.captions import CAPTION_SUFFIXES

_IMAGE = re.compile(r"(?:(\d+)\.)?(?:jpe?g|png|webp|gif|bmp|tiff?|ppm|avif|hei[cf]|img)")
# Suffixes of the texts of a record.
TEXT_SUFFIXES = frozenset({"json", "cls", *CAPTION_SUFFIXES})
_DETECTED = re.compile(r"(?:(\d+)\.)?npz")


@dataclass(frozen=True, kw_only=True)
class TarIndex:
    """R records with M members in all, as flat arrays.

    Attributes:
        first: uint32 [R + 1]. Record r has the members from first[r] to first[r + 1]: images in order, texts, regions.
        kind: uint8 [M], places in KINDS.
        offset: int64 [M], bytes before the member's content.
        length: uint32 [M], bytes of the content.
        keys: uint8, the keys of the records in UTF-8, each followed by a line end.
        key: uint32 [R + 1]. The key of record r is at keys[key[r] : key[r + 1] - 1].
        damage: what cannot be read of the tar.
    """

    first: np.ndarray
    kind: np.ndarray
    offset: np.ndarray
    length: np.ndarray
    keys: np.ndarray
    key: np.ndarray
    damage: list[Dropped]


KINDS = ("image", "json", "txt", "npz")


def scan(file: IO[bytes], name: str, size: int) -> TarIndex:
    """Indexes a tar of `size` bytes by reading its headers. Damaged parts are left out and listed under `damage`."""
    damage: list[Dropped] = []
    places = list(_members(file, name, size, damage))
    records = _records(places)
    # A cut may have taken members of the last record, which then would pass for a record without text.
    if damage and records:
        damage.append(
            Dropped(key=records.pop().key, reason=f"{name} is damaged behind this record, which may be incomplete")
        )
    damage += [Dropped(key=record.key, reason=f"{name}: {record.fault}") for record in records if record.fault]
    sound = [record for record in records if not record.fault]
    # Sorted by kind, then by the number before the suffix: `key.jpg`, `key.1.jpg`, `key.json`.
    flat = [(kind, offset, length) for record in sound for kind, _, offset, length in sorted(record.members)]
    table = np.asarray(flat, dtype=np.int64).reshape(-1, 3)
    keys = [f"{record.key}\n".encode("utf-8", "backslashreplace") for record in sound]
    return TarIndex(
        first=np.cumsum([0, *(len(record.members) for record in sound)], dtype=np.uint32),
        kind=table[:, 0].astype(np.uint8),
        offset=table[:, 1].copy(),
        length=table[:, 2].astype(np.uint32),
        keys=np.frombuffer(b"".join(keys), np.uint8),
        key=np.cumsum([0, *map(len, keys)], dtype=np.uint32),
        damage=damage,
    )


@dataclass
class _Members:
    """Members that follow each other and share a key: (place in KINDS, number, offset, length) of each."""

    key: str
    members: list[tuple[int, int, int, int]] = field(default_factory=list)
    suffixes: set[str] = field(default_factory=set)
    fault: str | None = None


def _records(places: Sequence[tarfile.TarInfo]) -> list[_Members]:
    """The records of a tar, in order. A member whose name comes twice begins another record, which is not used: nobody can say
    which of the two belongs to the members beside them."""
    records: list[_Members] = []
    for (key, suffix), member in zip(split_names([member.name for member in places]), places):
        sort = _kind(suffix)
        if sort is None:
            continue
        if not records or records[-1].key != key:
            records.append(_Members(key))
        elif suffix in records[-1].suffixes:
            records.append(_Members(key, fault=f"{member.name} comes twice"))
        record = records[-1]
        record.suffixes.add(suffix)
        record.members.append((*sort, member.offset_data, member.size))
        record.fault = record.fault or tar_members.fault(member)
    return records


def split_names(names: Sequence[str]) -> list[tuple[str, str]]:
    """Key and suffix of each member of a tar, in the order of the tar.

    A key ends before the last extension where that is a text's (`a/22.05.txt` is of `a/22.05`). Every other member belongs to
    the longest such key that its name begins with (`22.05.png` to 22.05; `7.1.jpg`, beside `7.json`, to 7 as its second image),
    or where there is none ends at the first dot of its base name, which is WebDataset's rule. A leading ./ is dropped.
    """
    split: list[tuple[str, str]] = []
    for _, run in groupby((name.removeprefix("./").rpartition("/")[::2] for name in names), _first_dot):
        members = list(run)
        keys = {base.rpartition(".")[0] for _, base in members if base.rpartition(".")[2].lower() in TEXT_SUFFIXES}
        for folder, base in members:
            stem, suffix = _split_base(base, keys)
            split.append((f"{folder}/{stem}" if folder else stem, suffix.lower()))
    return split


def _first_dot(place: tuple[str, str]) -> tuple[str, str]:
    folder, base = place
    return folder, base.partition(".")[0]


def _split_base(base: str, keys: Set[str]) -> tuple[str, str]:
    """Key and suffix of a base name, given the keys of the texts beside it."""
    stem = base
    while "." in stem:
        stem = stem.rpartition(".")[0]
        if stem in keys:
            return stem, base[len(stem) + 1 :]
    return base.partition(".")[::2]


def _kind(suffix: str) -> tuple[int, int] | None:
    """(place in KINDS, number of the image) by a member's suffix; None for a member that is not used."""
    for kind, pattern in (("image", _IMAGE), ("npz", _DETECTED)):
        if match := pattern.fullmatch(suffix):
            return KINDS.index(kind), int(match[1] or 0)
    return (KINDS.index(suffix), 0) if suffix in ("json", "txt") else None


def _members(file: IO[bytes], name: str, size: int, damage: list[Dropped]) -> Iterator[tarfile.TarInfo]:
    """Yields the tar's plain files, up to its end or its first damage, which is added to `damage`."""

    def note(reason: str) -> None:
        damage.append(Dropped(key=name, reason=reason))

    end = 0
    try:
        with tarfile.open(fileobj=file, mode="r:", tarinfo=tar_members.CheckedMember) as tar:
            for member in tar_members.members(tar):
                # A sparse member states the size that it would have, and stores less.
                end = tar.offset if member.issparse() else member.offset_data + member.size
                if end > size:
                    note(f"cut in the middle of {member.name}: {size} bytes are there, {end} were expected")
                    yield member  # its record is the damaged one
                    return
                if member.isreg():
                    yield member
    except (tarfile.TarError, EOFError, ValueError) as error:
        note(f"damaged after byte {end} ({error}); the records before it are used")
        return
    padded = -(-end // 512) * 512
    file.seek(padded)
    if file.read(512) != bytes(512):
        note(f"cut or damaged after byte {end}; the records before it are used")
