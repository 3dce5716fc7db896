"""A file of precomputed encoder states, read through memory mapping. An entry holds the S states of one image or text.

Its format is safetensors, so other tools can read it too:

    states       float16 or float32 [R D]: the states of all entries, one entry after the other
    first        int64 [N + 1]: entry i is states[first[i] : first[i + 1]]
    image_shape  int32 [N 3]: height, width and EXIF orientation of the stored image of each entry (zeros for texts)
    checksum     uint32 [N]: CRC-32 of the states and the shape of each entry
    filled       uint8 [N]: 1 where an entry was computed, 0 where its image cannot be read
    records      int64 [M + 1], only for texts, of which a record has several: record i has entries records[i] : records[i + 1]

`metadata["about"]` is JSON that describes what the states depend on: the encoder, the preprocessing, the shards.
"""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastvlp.data.records.decode import StoredShape
from fastvlp.errors import UserError
from fastvlp.plain_json import checksum as checksum_of
from fastvlp.plain_json import parse_json

StateType = Literal["fp16", "fp32"]
Name = Literal["states", "first", "image_shape", "checksum", "filled", "records"]
DTYPES = {"F16": "<f2", "F32": "<f4", "I64": "<i8", "I32": "<i4", "U32": "<u4", "U8": "u1"}
CODES: Mapping[StateType, str] = {"fp16": "F16", "fp32": "F32"}
# The largest header in bytes, the same as in safetensors.
MOST_BYTES = 100_000_000


class DamagedStatesError(Exception):
    """The file is damaged, or is not a file of states."""


class Table(NamedTuple):
    """Type, shape and position of a table in the file."""

    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def end(self) -> int:
        return self.offset + self.dtype.itemsize * math.prod(self.shape)


class EntryShape(NamedTuple):
    """The number of states of each entry [N]; for texts, also where the entries of each record begin [M + 1]."""

    lengths: Sequence[int]
    records: Sequence[int] | None = None


class Entries(NamedTuple):
    """The layout of a file before its states are computed: their number, width and type, and what they depend on."""

    shape: EntryShape
    width: int
    dtype: StateType
    about: Mapping[str, Any]

    def header(self) -> bytes:
        count, rows = len(self.shape.lengths), int(np.sum(self.shape.lengths))
        shapes: dict[str, tuple[str, tuple[int, ...]]] = {
            "states": (CODES[self.dtype], (rows, self.width)),
            "first": ("I64", (count + 1,)),
            "image_shape": ("I32", (count, 3)),
            "checksum": ("U32", (count,)),
            "filled": ("U8", (count,)),
        }
        if self.shape.records is not None:
            shapes["records"] = ("I64", (len(self.shape.records),))
        first = np.concatenate([[0], np.cumsum(np.asarray(self.shape.lengths, np.int64))])
        records = [] if self.shape.records is None else [np.asarray(self.shape.records, "<i8")]
        layout = checksum_of([first.astype("<i8"), *records])
        fields: dict[str, Any] = {"__metadata__": {"about": json.dumps(self.about, sort_keys=True), "layout": layout}}
        offset = 0
        for name, (code, shape) in shapes.items():
            end = offset + np.dtype(DTYPES[code]).itemsize * int(np.prod(shape))
            fields[name] = {"dtype": code, "shape": list(shape), "data_offsets": [offset, end]}
            offset = end
        text = json.dumps(fields).encode()
        text += b" " * (-len(text) % 64 + 56)
        return len(text).to_bytes(8, "little") + text

    @property
    def size(self) -> int:
        """Bytes of the file."""
        header = self.header()
        return max(table.end for table in read_header(header).tables.values())


class Header(NamedTuple):
    """The tables of a file, what its states depend on, and the checksum of `first` and `records`, which older files lack."""

    tables: dict[str, Table]
    about: dict[str, Any]
    layout: str | None


def read_header(data: bytes) -> Header:
    """Reads the first bytes of a file. Raises DamagedStatesError."""
    try:
        fields = parse_json(data[8 : 8 + int.from_bytes(data[:8], "little")])
        metadata = fields.pop("__metadata__")
        start = 8 + int.from_bytes(data[:8], "little")
        tables = {
            name: Table(np.dtype(DTYPES[t["dtype"]]), tuple(map(int, t["shape"])), start + int(t["data_offsets"][0]))
            for name, t in fields.items()
        }
        if missing := {"states", "first", "image_shape", "checksum", "filled"} - {*tables}:
            raise DamagedStatesError(f"it lacks {', '.join(sorted(missing))}")
        if any(table.offset < start or min(table.shape, default=0) < 0 for table in tables.values()):
            raise DamagedStatesError("its tables are not where its header says")
        return Header(tables, parse_json(metadata["about"]), metadata.get("layout"))
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise DamagedStatesError("its header cannot be read") from error


def checksum(states: np.ndarray, image_shape: np.ndarray) -> int:
    """Returns the CRC-32 of one entry."""
    return zlib.crc32(image_shape.tobytes(), zlib.crc32(states.tobytes()))


class StatesFile:
    """The entries of a complete file. Picklable, and safe to use after a fork.

    Raises DamagedStatesError if the file cannot be read, is not a file of states, or does not have the size in its header.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                if length > MOST_BYTES:
                    raise DamagedStatesError("its header cannot be read")
                file.seek(0)
                self._tables, self.about, layout = read_header(file.read(8 + length))
                size = os.fstat(file.fileno()).st_size
        except OSError as error:
            raise DamagedStatesError(error.strerror or str(error)) from error
        if size != max(table.end for table in self._tables.values()):
            raise DamagedStatesError(f"it has {size} bytes, and its header says otherwise")
        self._states, self._first = self._table("states"), self._table("first")
        self._shape, self._checksum, self._filled = (self._table(n) for n in ("image_shape", "checksum", "filled"))
        self._records = self._table("records") if "records" in self._tables else np.arange(len(self) + 1)
        self._checked = np.zeros(len(self), dtype=bool)
        names: list[Name] = ["first", "records"]
        starts = [self._table(name) for name in names if name in self._tables]
        if layout not in (None, checksum_of(starts)):
            raise DamagedStatesError("its entries are not where they were written")
        shapes = {name: table.shape for name, table in self._tables.items()}
        n, m = len(self), len(self._records) - 1
        expected = {"first": (n + 1,), "image_shape": (n, 3), "checksum": (n,), "filled": (n,), "records": (m + 1,)}
        if (
            any(shapes[name] != expected[name] for name in shapes.keys() & expected.keys())
            or len(shapes["states"]) != 2
        ):
            raise DamagedStatesError("its tables have other shapes")
        for first, end in ((self._first, len(self._states)), (self._records, n)):
            if len(first) < 1 or first[0] or first[-1] != end or (np.diff(first) < 0).any():
                raise DamagedStatesError("its entries are not where its header says")

    def _table(self, name: Name) -> np.ndarray:
        table = self._tables[name]
        # Mode "c" (copy on write) only because torch warns about read-only arrays; nobody writes to it.
        return np.memmap(self.path, table.dtype, "c", table.offset, table.shape)

    def __len__(self) -> int:
        return len(self._filled)

    def __contains__(self, i: int) -> bool:
        return bool(self._filled[i])

    def image(self, i: int) -> Tensor:
        """The states of an image, in place of its pixels."""
        return self.entry(i)

    def entry(self, i: int) -> Tensor:
        """Reads the states of entry i, [S D]. The first read of an entry compares its checksum, and raises UserError if it is
        wrong."""
        states = self._states[int(self._first[i]) : int(self._first[i + 1])]
        if not self._checked[i]:
            if checksum(states, self._shape[i]) != self._checksum[i]:
                raise UserError(
                    f"{self.path}: damaged, entry {i} is not what was written; delete the file, so that its states are "
                    "computed again"
                )
            self._checked[i] = True
        return torch.from_numpy(np.array(states))

    def shape(self, i: int) -> StoredShape:
        """Returns height, width and orientation of the stored image of entry i."""
        return StoredShape(*self._shape[i].tolist())

    def lengths(self) -> np.ndarray:
        """Returns the number of states of each entry, int64 [N]."""
        return np.diff(self._first)

    def of_record(self, i: int) -> range:
        """The entries of record i, of a file of texts."""
        return range(int(self._records[i]), int(self._records[i + 1]))

    def __reduce__(self) -> tuple[type[StatesFile], tuple[Path]]:
        return StatesFile, (self.path,)


class StatesWriter:
    """Writes the entries of an unfinished file, which gets its final name when it is complete. Entries that an interrupted run
    wrote are kept, and are not `missing`.

    Raises OSError if the disk is full.
    """

    def __init__(self, file: int, entries: Entries):
        self._file, header = file, entries.header()
        self._tables = read_header(header).tables
        self.first = np.concatenate([[0], np.cumsum(np.asarray(entries.shape.lengths, np.int64))])
        size = max(table.end for table in self._tables.values())
        if os.pread(file, len(header), 0) != header or os.fstat(file).st_size != size:
            os.ftruncate(file, 0)
            # Reserved now, so that a full disk is noticed before hours of computing and not after them.
            reserve(file, size)
            self._write("first", 0, self.first.astype("<i8"))
            if entries.shape.records is not None:
                self._write("records", 0, np.asarray(entries.shape.records, "<i8"))
            write_at(file, header, 0)

    def missing(self) -> list[int]:
        """Returns the entries that are still to be computed."""
        filled = self._read("filled", 0, len(self.first) - 1)
        return [i for i, done in enumerate(filled) if not (done and self._is_whole(i))]

    def put(self, i: int, states: np.ndarray, image_shape: Sequence[int] = (0, 0, 0)) -> None:
        """Writes the states [S D] of entry i."""
        shape = np.asarray(image_shape, np.int32)
        states = np.ascontiguousarray(states, self._tables["states"].dtype)
        self._write("states", int(self.first[i]), states)
        self._write("image_shape", i, shape)
        self._write("checksum", i, np.asarray(checksum(states, shape), np.uint32))
        self._write("filled", i, np.asarray(1, np.uint8))

    def _is_whole(self, i: int) -> bool:
        states = self._read("states", int(self.first[i]), int(self.first[i + 1]))
        shape = self._read("image_shape", i, i + 1)[0]
        return checksum(states, shape) == self._read("checksum", i, i + 1)[0]

    def _row(self, name: Name) -> tuple[np.dtype, tuple[int, ...], int, int]:
        dtype, shape, offset = self._tables[name]
        return dtype, shape[1:], offset, dtype.itemsize * int(np.prod(shape[1:]))

    def _read(self, name: Name, first: int, end: int) -> np.ndarray:
        dtype, shape, offset, size = self._row(name)
        data = os.pread(self._file, (end - first) * size, offset + first * size)
        return np.frombuffer(data, dtype).reshape(end - first, *shape)

    def _write(self, name: Name, first: int, rows: np.ndarray) -> None:
        *_, offset, size = self._row(name)
        write_at(self._file, rows.tobytes(), offset + first * size)


def write_at(file: int, data: bytes, at: int) -> None:
    rest = memoryview(data)
    while rest:
        written = os.pwrite(file, rest, at)
        rest, at = rest[written:], at + written


def reserve(file: int, size: int) -> None:
    """Reserves `size` bytes on the disk for a file."""
    if hasattr(os, "posix_fallocate") and size:
        os.posix_fallocate(file, 0, size)
    else:
        os.ftruncate(file, size)
