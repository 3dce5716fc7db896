"""Files of flat arrays, read through memory mapping: millions of rows cost no memory of a process, and ranks share their pages.

The format is safetensors, so other tools can read it too. `metadata["about"]` is JSON that says what the arrays are of; it has
the type, size and CRC-32 of each array, and a CRC-32 of itself.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from fastvlp.plain_json import check_sum, parse_strict_json, with_checksum

CODES = {"U8": "u1", "U16": "<u2", "U32": "<u4", "I64": "<i8"}
_CODE_OF = {np.dtype(code): name for name, code in CODES.items()}
# The largest header in bytes, the same as in safetensors.
MOST_HEADER = 100_000_000
_BLOCK = 1 << 20
# Arrays begin at multiples of this, and so do pages and cache lines.
_ALIGNED = 64


class DamagedArraysError(Exception):
    """The file is not what was written, or not of its kind."""


class FlatArrays(NamedTuple):
    """One-dimensional arrays by name, read-only, and what they are of."""

    arrays: dict[str, np.ndarray]
    about: dict[str, Any]


class FlatWriter:
    """Arrays that are written piece by piece, in turns. Their parts lie in files without a name in `folder`, not in memory,
    until `close`."""

    def __init__(self, dtypes: Mapping[str, Any], folder: Path):
        self._dtypes = {name: np.dtype(dtype) for name, dtype in dtypes.items()}
        self._files: dict[str, IO[bytes]] = {name: tempfile.TemporaryFile(dir=folder) for name in dtypes}  # noqa: SIM115
        self._sums = dict.fromkeys(dtypes, 0)
        self.counts = dict.fromkeys(dtypes, 0)

    def add(self, name: str, part: Any) -> None:
        """Adds numbers behind those that an array has."""
        data = np.ascontiguousarray(part, self._dtypes[name])
        self._files[name].write(data.data)
        self._sums[name] = zlib.crc32(data.data, self._sums[name])
        self.counts[name] += data.size

    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays that were written so far, mapped into memory."""
        for file in self._files.values():
            file.flush()
        return {name: _mapped(file, self._dtypes[name], self.counts[name], 0) for name, file in self._files.items()}

    def save(self, file: int, about: Mapping[str, Any]) -> None:
        """Writes the whole file. Raises OSError if the disk is full."""
        arrays = [[name, _CODE_OF[dtype], self.counts[name], self._sums[name]] for name, dtype in self._dtypes.items()]
        os.ftruncate(file, 0)
        with open(file, "wb", closefd=False) as out:
            out.write(_header(with_checksum({"arrays": arrays, **about})))
            for name, part in self._files.items():
                part.seek(0)
                shutil.copyfileobj(part, out, _BLOCK)
                out.write(bytes(-self._dtypes[name].itemsize * self.counts[name] % _ALIGNED))

    def close(self) -> None:
        for file in self._files.values():
            file.close()


def _header(about: Mapping[str, Any]) -> bytes:
    fields: dict[str, Any] = {"__metadata__": {"about": json.dumps(about, sort_keys=True)}}
    offset = 0
    for name, code, count, _ in about["arrays"]:
        size = np.dtype(CODES[code]).itemsize * count
        fields[name] = {"dtype": code, "shape": [count], "data_offsets": [offset, offset + size]}
        offset += size
        if rest := -size % _ALIGNED:
            # Safetensors allows no gaps.
            fields[f"{name}.padding"] = {"dtype": "U8", "shape": [rest], "data_offsets": [offset, offset + rest]}
            offset += rest
    text = json.dumps(fields).encode()
    text += b" " * (-(len(text) + 8) % _ALIGNED)
    return len(text).to_bytes(8, "little") + text


def open_flat(path: Path, *, check: bool = True) -> FlatArrays:
    """Opens a file that `FlatWriter` has written.

    Args:
        check: compare the checksums of the arrays, which reads the file once, in blocks.

    Raises DamagedArraysError if it is not what was written, and OSError if it cannot be read. Its size is compared with
    its header before anything else.
    """
    with path.open("rb") as file:
        about = _read_about(file)
        places, at = {}, file.tell()
        for name, code, count, _ in about["arrays"]:
            dtype = np.dtype(CODES[code])
            places[name] = (dtype, count, at)
            at += -(-dtype.itemsize * count // _ALIGNED) * _ALIGNED
        if os.fstat(file.fileno()).st_size != at:
            raise DamagedArraysError("its size is another than its header says")
        if check:
            sums = [crc for *_, crc in about["arrays"]]
            for (name, (dtype, count, offset)), crc in zip(places.items(), sums):
                if _sum(file, offset, dtype.itemsize * count) != crc:
                    raise DamagedArraysError(f"`{name}` is not what was written")
        arrays = {name: _mapped(file, *place) for name, place in places.items()}
    return FlatArrays(arrays, about)


def _read_about(file: IO[bytes]) -> dict[str, Any]:
    """Reads the header. The file position is then behind it."""
    length = int.from_bytes(file.read(8), "little")
    if not 0 < length <= min(MOST_HEADER, os.fstat(file.fileno()).st_size):
        raise DamagedArraysError("its header cannot be read")
    try:
        text = file.read(length)
        about = check_sum(parse_strict_json(parse_strict_json(text)["__metadata__"]["about"]))
        for name, code, count, crc in about["arrays"]:
            if (
                not isinstance(name, str)
                or code not in CODES
                or not isinstance(count, int)
                or count < 0
                or not isinstance(crc, int)
            ):
                raise DamagedArraysError("its header cannot be read")
        # All else in the header follows from this.
        if _header(with_checksum(about)) != length.to_bytes(8, "little") + text:
            raise DamagedArraysError("its header is not what was written")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedArraysError("its header cannot be read") from error
    return about


def _sum(file: IO[bytes], offset: int, size: int) -> int:
    file.seek(offset)
    value = 0
    while size > 0 and (block := file.read(min(_BLOCK, size))):
        value, size = zlib.crc32(block, value), size - len(block)
    return value


def _mapped(file: IO[bytes], dtype: np.dtype, count: int, offset: int) -> np.ndarray:
    if not count:
        return np.empty(0, dtype)
    # Slices of a plain array are made faster than those of a memmap.
    return np.asarray(np.memmap(file, dtype, "r", offset, (count,)))
