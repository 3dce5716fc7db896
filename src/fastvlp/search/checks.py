"""Checks the arguments of an index. All engines have the same checks, so that an item that one of them can hold, all can
hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Any

import numpy as np

from fastvlp.errors import UserError

Scalar = str | int | float | bool
# Fields that items must have: each with its value, or with a list of values, one of which is enough.
Where = Mapping[str, Scalar | Sequence[Scalar]]
# Largest sum of `k` and `offset`.
DEEPEST = 10_000
# Largest number of fields of a filter, and of values of a field, because databases limit the depth of an expression, such as to
# a thousand.
MOST_CONDITIONS, MOST_VALUES = 32, 256
# Beginning of the names of fields that engines use for themselves.
OWN_FIELDS = "fastvlp:"
RESERVED = ("$", "#", "chroma:", OWN_FIELDS)
FIELD = f"a field holds a text, a finite number, true or false, and its name does not begin with {', '.join(RESERVED)}"


class EngineError(UserError):
    """The engine does not answer, fails, or cannot write. The sender of an HTTP request cannot correct this."""


def check_rows(vectors: np.ndarray, width: int) -> np.ndarray:
    """Returns vectors as float32 [n width]. Raises UserError for another shape, and for numbers that are not finite."""
    rows = np.ascontiguousarray(vectors, dtype=np.float32)
    if rows.ndim != 2 or rows.shape[1] != width:
        raise UserError(f"vectors of shape {list(rows.shape)}; the index has vectors of {width} dimensions")
    if not np.isfinite(rows).all():
        raise UserError("a vector has a number that is not finite; embed the record again")
    return rows


def check_items(
    ids: Sequence[str], vectors: np.ndarray, infos: Sequence[Mapping[str, Scalar]], width: int
) -> np.ndarray:
    """Returns the vectors of items to add as float32 [n width]. Raises UserError for items that an index cannot hold."""
    if not len(ids) == len(vectors) == len(infos):
        raise UserError(f"{len(ids)} ids, {len(vectors)} vectors and {len(infos)} infos; give one of each per item")
    if len({*ids}) < len(ids):
        raise UserError("two of the items to add have the same id; give every item its own")
    for id, info in zip(ids, infos):
        if not isinstance(id, str) or not id or not _storable(id):
            raise UserError(f"id {id!r}: an id must be a text of Unicode characters that is not empty")
        for name, value in info.items():
            if not _is_field(name) or not _storable(value):
                raise UserError(f"{id}: field {name!r} is {value!r}; {FIELD}")
    return check_rows(vectors, width)


def check_where(where: Where | None) -> dict[str, list[Scalar]]:
    """Returns for each field the list of its values. Raises UserError for a field or value that no item can have."""
    if len(where or {}) > MOST_CONDITIONS:
        raise UserError(f"`where` has {len(where or {})} fields; give at most {MOST_CONDITIONS}")
    choices: dict[str, list[Scalar]] = {}
    for name, wanted in (where or {}).items():
        values = [wanted] if isinstance(wanted, str | int | float) else list(wanted)
        if len(values) > MOST_VALUES:
            raise UserError(f"where {name!r} has {len(values)} values; give at most {MOST_VALUES}")
        if not _is_field(name) or not all(map(_storable, values)):
            raise UserError(f"where {name!r} is {wanted!r}; {FIELD}")
        choices[name] = values
    return choices


def check_depth(k: int, offset: int) -> None:
    """Raises UserError if `k` or `offset` is out of range."""
    if k < 1 or offset < 0:
        raise UserError(f"`k` {k} must be at least 1, and `offset` {offset} at least 0")
    if k + offset > DEEPEST:
        raise UserError(
            f"`k` {k} after {offset}: an index returns at most the {DEEPEST} best items; narrow the search with a filter"
        )


def storable_ids(ids: Sequence[str]) -> list[str]:
    """Returns those of the ids that an item can have, each once; engines refuse to look for others."""
    return [id for id in dict.fromkeys(ids) if _storable(id)]


def _is_field(name: Any) -> bool:
    return isinstance(name, str) and name != "" and _storable(name) and not name.startswith(RESERVED)


def _storable(value: Any) -> bool:
    """Whether every engine can hold a value: no lone surrogates, no NUL, integers of 64 bits."""
    if isinstance(value, str):
        return "\0" not in value and not any("\ud800" <= letter <= "\udfff" for letter in value)
    if isinstance(value, float):
        return isfinite(value)
    return isinstance(value, int) and -(2**63) <= value < 2**63
