"""The index of a tar, its members and their places: read from its headers once, kept in a small file beside it."""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Iterator, Sequence, Set
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import IO

import numpy as np

from fastvlp.batch import Dropped
from fastvlp.data.records.captions import CAPTION_SUFFIXES

_VERSION = 3
_IMAGE = re.compile(r"(?:(\d+)\.)?(?:jpe?g|png|webp|gif|bmp|tiff?|ppm|avif|hei[cf]|img)")
# Suffixes of the texts of a record.
TEXT_SUFFIXES = frozenset({"json", "cls", *CAPTION_SUFFIXES})
_DETECTED = re.compile(r"(?:(\d+)\.)?npz")


@dataclass(frozen=True, kw_only=True)
class TarIndex:
    """R records with M members in all.

    Flat arrays, because millions of small objects would take gigabytes and be copied page by page in loader workers.

    Attributes:
        size: bytes of the tar.
        mtime_ns: when it was last changed.
        keys: of the records.
        first: int64 [R + 1]. Record r has the members from first[r] to first[r + 1]: images in order, texts, regions.
        kind: uint8 [M], places in KINDS.
        offset: int64 [M], bytes before the member's content.
        length: int64 [M], bytes of the content.
        damage: what cannot be read of the tar.
    """

    size: int
    mtime_ns: int
    keys: list[str]
    first: np.ndarray
    kind: np.ndarray
    offset: np.ndarray
    length: np.ndarray
    damage: list[Dropped]

    def members(self, r: int) -> Iterator[tuple[str, int, int]]:
        """Yields (kind, offset, length) of each member of record r."""
        for m in range(int(self.first[r]), int(self.first[r + 1])):
            yield KINDS[self.kind[m]], int(self.offset[m]), int(self.length[m])

    def to_json(self) -> bytes:
        fields = {
            name: value.tolist() if isinstance(value, np.ndarray) else value
            for name, value in vars(self).items()
            if name != "damage"
        }
        return json.dumps({"version": _VERSION, **fields, "damage": [asdict(d) for d in self.damage]}).encode()

    @classmethod
    def from_json(cls, data: bytes) -> TarIndex | None:
        """The index in a file; None where it is not one of this version."""
        try:
            fields = json.loads(data)
            if fields.pop("version") != _VERSION:
                return None
            fields["damage"] = [Dropped(**d) for d in fields["damage"]]
            for name in ("first", "offset", "length"):
                fields[name] = np.asarray(fields[name], dtype=np.int64)
            fields["kind"] = np.asarray(fields["kind"], dtype=np.uint8)
            return cls(**fields)
        except (ValueError, KeyError, TypeError, AttributeError):
            return None


KINDS = ("image", "json", "txt", "npz")


def scan(file: IO[bytes], name: str, size: int, mtime_ns: int) -> TarIndex:
    """Indexes a tar of `size` bytes by reading its headers. Damaged parts are left out and listed under `damage`."""
    damage: list[Dropped] = []
    keys: list[str] = []
    first: list[int] = [0]
    flat: list[tuple[int, int, int]] = []

    def close(key: str, members: list[tuple[int, int, int, int]]) -> None:
        # Sorted by kind, then by the number before the suffix: `key.jpg`, `key.1.jpg`, `key.json`.
        flat.extend((kind, offset, length) for kind, _, offset, length in sorted(members))
        keys.append(key)
        first.append(len(flat))

    places = [(member.name, member.offset_data, member.size) for member in _members(file, name, size, damage)]
    current: str | None = None
    members: list[tuple[int, int, int, int]] = []
    for (key, suffix), (_, offset, length) in zip(split_names([place[0] for place in places]), places):
        sort = _kind(suffix)
        if sort is None:
            continue
        if key != current:
            if current is not None:
                close(current, members)
            current, members = key, []
        members.append((*sort, offset, length))
    # A cut may have taken members of the last record, which then would pass for a record without text.
    if current is not None:
        if damage:
            damage.append(Dropped(key=current, reason=f"{name} is damaged behind this record, which may be incomplete"))
        else:
            close(current, members)
    table = np.asarray(flat, dtype=np.int64).reshape(-1, 3)
    return TarIndex(
        size=size,
        mtime_ns=mtime_ns,
        keys=keys,
        first=np.asarray(first, dtype=np.int64),
        kind=table[:, 0].astype(np.uint8),
        offset=table[:, 1].copy(),
        length=table[:, 2].copy(),
        damage=damage,
    )


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
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                end = member.offset_data + member.size
                if end > size:
                    note(f"cut in the middle of {member.name}: {size} bytes are there, {end} were expected")
                    yield member  # its record is the damaged one
                    return
                if member.isreg() and not member.issparse():
                    yield member
                vars(tar)["members"].clear()  # tarfile would keep every header
    except (tarfile.TarError, EOFError, ValueError) as error:
        note(f"damaged after byte {end} ({error}); the records before it are used")
        return
    padded = -(-end // 512) * 512
    file.seek(padded)
    if file.read(512) != bytes(512):
        note(f"cut or damaged after byte {end}; the records before it are used")
