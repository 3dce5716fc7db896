"""The index of a tar, its members and their places: read from its headers once, kept in a small file beside it."""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import IO

import numpy as np

from fastvlp.batch import Dropped

_VERSION = 2
_IMAGE = re.compile(r"(?:(\d+)\.)?(?:jpe?g|png|webp|gif|bmp|tiff?|ppm|img)")
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

    current: str | None = None
    members: list[tuple[int, int, int, int]] = []
    for member in _members(file, name, size, damage):
        key, suffix = split_name(member.name)
        sort = _kind(suffix)
        if sort is None:
            continue
        if key != current:
            if current is not None:
                close(current, members)
            current, members = key, []
        members.append((*sort, member.offset_data, member.size))
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


def split_name(name: str) -> tuple[str, str]:
    """Key and suffix of a member by WebDataset's rule: the key ends at the first dot of the base name. A leading ./ is
    dropped."""
    folder, _, base = name.removeprefix("./").rpartition("/")
    stem, _, suffix = base.partition(".")
    return (f"{folder}/{stem}" if folder else stem), suffix.lower()


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
