"""JSON from files that may be damaged or hostile: its size, depth, repeated names and numbers are checked, and its checksum
where it has one."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fastvlp.files import read_plain

# A config is a few kilobytes; a vocabulary or the list of an index may be tens of megabytes.
MOST_BYTES = 1 << 28
# Code that walks through a value calls itself for each level; Python allows a thousand calls in all.
MOST_DEPTH = 100
CHECKSUM = "checksum"


def parse_json(text: str | bytes) -> Any:
    """A value of any kind, at most MOST_DEPTH levels deep. Raises ValueError if it is deeper or no JSON.

    Of a name that an object has twice the last value counts, and NaN is read: both are common in data sets.
    """
    return _bounded(text, _lenient)


def parse_strict_json(text: str | bytes) -> Any:
    """Parses JSON like `parse_json`, for files that the library itself wrote: a repeated name and NaN are errors too."""
    return _bounded(text, _strict)


def read_strict_json(path: Path) -> Any:
    """A file that the library wrote. Raises OSError as `read_plain`, and ValueError as `parse_strict_json`."""
    return parse_strict_json(read_plain(path, MOST_BYTES))


def with_checksum(value: Mapping[str, Any]) -> dict[str, Any]:
    """The object with a checksum of all else in it, which `check_sum` compares."""
    return {**value, CHECKSUM: checksum([_canonical(value)])}


def check_sum(value: Any) -> dict[str, Any]:
    """The object without its checksum. Raises ValueError if it is no object, or not the one that was written; files of
    earlier versions have no checksum."""
    if not isinstance(value, dict):
        raise ValueError(f"it holds a {type(value).__name__} and no object")
    rest = {name: part for name, part in value.items() if name != CHECKSUM}
    if CHECKSUM in value and value[CHECKSUM] != checksum([_canonical(rest)]):
        raise ValueError(f"it is not what was written; if you changed it yourself, remove its {CHECKSUM!r}")
    return rest


def checksum(parts: Iterable[Any]) -> str:
    """The CRC-32 of bytes, or of arrays of them, one after the other."""
    value = 0
    for part in parts:
        value = zlib.crc32(part, value)
    return f"crc32:{value:08x}"


def _canonical(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, sort_keys=True).encode()


def _bounded(text: str | bytes, decoder: json.JSONDecoder) -> Any:
    try:
        value = decoder.decode(text if isinstance(text, str) else text.decode("utf-8-sig"))
    except RecursionError:
        raise ValueError(f"nested more than {MOST_DEPTH} levels deep") from None
    brackets = text.count("[") + text.count("{") if isinstance(text, str) else text.count(b"[") + text.count(b"{")
    # Few values have so many brackets that their depth has to be measured.
    if brackets > MOST_DEPTH and _depth(value) > MOST_DEPTH:
        raise ValueError(f"nested more than {MOST_DEPTH} levels deep")
    return value


def _depth(value: Any) -> int:
    level, depth = [value], 0
    while level := [one for one in level if isinstance(one, dict | list)]:
        level = [part for one in level for part in (one.values() if isinstance(one, dict) else one)]
        depth += 1
    return depth


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is there twice")
    return value


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


_lenient = json.JSONDecoder()
_strict = json.JSONDecoder(object_pairs_hook=_once, parse_constant=_no_constant)
