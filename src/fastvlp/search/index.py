"""An index of vectors, whichever engine keeps it: Chroma in a folder or on a server, or PostgreSQL with pgvector.

An engine is for search in what people add and delete; evaluation multiplies matrices. No engine is told more than vectors,
ids and a few plain fields: which model the vectors are of stands beside them, and those of another model are refused.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from fastvlp.errors import UserError

if TYPE_CHECKING:
    from fastvlp.search.pictures import Kept

FORMAT = 1
# Of the address of an index that is a folder of `vlp embed`.
CODES = "codes:"
# Of one search, those before the page counted.
MOST = 10_000
Scalar = str | int | float | bool
# What items are asked to have: of each field the value, or a list of those that will do.
Where = Mapping[str, Scalar | Sequence[Scalar]]


@dataclass(frozen=True, kw_only=True)
class Stamp:
    """Whose vectors an index has. fingerprint: of the export (`Embedder.fingerprint`). model: its name, for people."""

    fingerprint: str
    width: int
    model: str = ""
    format: int = FORMAT


class Hit(NamedTuple):
    """`score`: the cosine, -1 to 1."""

    id: str
    score: float
    info: dict[str, Scalar]


class Item(NamedTuple):
    id: str
    vector: np.ndarray
    info: dict[str, Scalar]


class EngineError(UserError):
    """The engine does not answer, fails, or cannot write: nothing that who asks over HTTP can mend."""


class Index(Protocol):
    """All raise UserError for what an index cannot hold or be asked, and EngineError where that is not the reason."""

    @property
    def stamp(self) -> Stamp: ...

    def add(self, ids: Sequence[str], vectors: np.ndarray, infos: Sequence[Mapping[str, Scalar]]) -> None:
        """`vectors`: unit rows [n width]. What has one of the ids is replaced. When it returns, all are on the disk; when
        it is cut short, some are."""

    def delete(self, ids: Sequence[str]) -> int:
        """How many of them there were."""

    def search(self, vectors: np.ndarray, k: int, where: Where | None = None, offset: int = 0) -> list[list[Hit]]:
        """For each row [q width] the nearest items, best first, of those `where` holds for; the first `offset` are left
        out. Engines search approximately: an item may be missed."""

    def count(self) -> int: ...

    def get(self, ids: Sequence[str]) -> list[Item]:
        """Those that are present, in the order of the ids."""

    def close(self) -> None: ...


def open_index(uri: str, stamp: Stamp | None = None, create: bool = False) -> Index:
    """A folder, http(s)://HOST:PORT/NAME of a Chroma server, postgresql://USER@HOST/DATABASE#TABLE with pgvector, or
    codes:FOLDER of what `vlp embed` wrote, to search and no more.

    `stamp`: of the model that will ask; None takes whatever there is. `create`: makes an empty index of that stamp where
    there is none. Raises UserError where there is no index, it is of another model, or its engine is not installed.
    """
    if create and stamp is None:
        raise ValueError("an index that may be made needs the stamp of its model")
    if uri.startswith(CODES):
        from fastvlp.search.engines.codes import CodesIndex

        return CodesIndex(uri, stamp)
    if uri.startswith(("postgresql://", "postgres://")):
        from fastvlp.search.engines.pgvector import PgIndex

        return PgIndex(uri, stamp, create)
    if "://" in uri and not uri.startswith(("http://", "https://")):
        raise UserError(
            f"{uri}: an index is a folder, http://HOST:PORT/NAME of a Chroma server, postgresql://USER@HOST/DATABASE, or "
            f"{CODES}FOLDER of what `vlp embed` wrote"
        )
    from fastvlp.search.engines.chroma import ChromaIndex

    return ChromaIndex(uri, stamp, create)


def pictures_of(uri: str, folder: str | Path | None = None) -> Kept | None:
    """Where the pictures of an index's items are: in the folder that was told, in the index's own, or in the shards that were
    embedded; none where it is on a server and nobody told, or the shards are gone."""
    from fastvlp.search.pictures import Pictures, shard_pictures

    if folder is not None:
        return Pictures(folder)
    if uri.startswith(CODES):
        return shard_pictures(Path(uri.removeprefix(CODES)))
    return None if "://" in uri else Pictures(Path(uri) / "pictures")


def agreed(told: Mapping[str, Any] | None, stamp: Stamp | None, where: str) -> Stamp:
    """What an index says of its model, where that is the one that asks."""
    names = [field.name for field in fields(Stamp)]
    if told is None or any(name not in told for name in names):
        raise UserError(f"{where}: made by another program, it does not say of which model; choose another place")
    found = Stamp(**{name: told[name] for name in names})
    if found.format > FORMAT:
        raise UserError(f"{where}: made by a newer fastvlp (format {found.format}, this one {FORMAT}); upgrade fastvlp")
    if stamp is not None and (found.fingerprint, found.width) != (stamp.fingerprint, stamp.width):
        raise UserError(
            f"{where}: has vectors of another model, {found.model or 'unnamed'} ({found.fingerprint[:8]}), not of "
            f"{stamp.model or 'unnamed'} ({stamp.fingerprint[:8]}); give that one's export, or build another index"
        )
    return found


def as_fields(stamp: Stamp) -> dict[str, Scalar]:
    return asdict(stamp)


def rows(vectors: np.ndarray, width: int) -> np.ndarray:
    """float32 [n width], with nothing in it that is no number. Raises UserError for anything else."""
    found = np.ascontiguousarray(vectors, dtype=np.float32)
    if found.ndim != 2 or found.shape[1] != width:
        raise UserError(f"vectors of shape {list(found.shape)}; the index has rows of {width} numbers")
    if not np.isfinite(found).all():
        raise UserError("a vector has something that is no finite number; embed the record again")
    return found


def fitting(ids: Sequence[str], vectors: np.ndarray, infos: Sequence[Mapping[str, Scalar]], width: int) -> np.ndarray:
    """The vectors of an addition that an index can take. Raises UserError for any other."""
    if not len(ids) == len(vectors) == len(infos):
        raise UserError(f"{len(ids)} ids, {len(vectors)} vectors and {len(infos)} infos; give one of each an item")
    if len({*ids}) < len(ids):
        raise UserError("an id stands twice among those to add; give every item its own")
    for id, info in zip(ids, infos):
        if not isinstance(id, str) or not id or not _storable(id):
            raise UserError(f"id {id!r}: an id is a text of Unicode characters, not empty")
        for name, value in info.items():
            if not _named(name) or not _storable(value):
                raise UserError(f"{id}: field {name!r} is {value!r}; {FIELD}")
    return rows(vectors, width)


def middle(vectors: Sequence[np.ndarray]) -> np.ndarray:
    """The direction between unit vectors [E]; the first where they cancel out."""
    total = np.sum(vectors, axis=0)
    length = float(np.linalg.norm(total))
    return total / length if length > 1e-6 else vectors[0]


def choices(where: Where | None) -> dict[str, list[Scalar]]:
    """Of each field the values that will do. Raises UserError for a field or value that no item can have."""
    found: dict[str, list[Scalar]] = {}
    for name, told in (where or {}).items():
        values = [told] if isinstance(told, str | int | float) else list(told)
        if not _named(name) or not all(map(_storable, values)):
            raise UserError(f"where {name!r} is {told!r}; {FIELD}")
        found[name] = values
    return found


FIELD = "a field holds a text, a finite number, true or false, and its name does not begin with $, # or chroma:"


def _named(name: Any) -> bool:
    return isinstance(name, str) and name != "" and _storable(name) and not name.startswith(("$", "#", "chroma:"))


def _storable(value: Any) -> bool:
    """Whether every engine can hold it: no lone surrogates, no NUL, integers of 64 bits."""
    if isinstance(value, str):
        return "\0" not in value and not any("\ud800" <= letter <= "\udfff" for letter in value)
    if isinstance(value, float):
        return isfinite(value)
    return isinstance(value, int) and -(2**63) <= value < 2**63


def possible(ids: Sequence[str]) -> list[str]:
    """Those that an item can have, each once: engines refuse to look for others."""
    return [id for id in dict.fromkeys(ids) if _storable(id)]


def page(k: int, offset: int) -> int:
    """How many are searched for to give k after `offset`. Raises UserError where either is out of range."""
    if k < 1 or offset < 0:
        raise UserError(f"k {k} must be at least 1, and offset {offset} at least 0")
    if k + offset > MOST:
        raise UserError(
            f"k {k} after {offset}: an index gives the {MOST} best at most; narrow the search with a filter"
        )
    return k + offset


class WriterLock:
    """One process at a time writes to a folder: taken with the first write, kept until it is closed or the process ends,
    however it ends."""

    def __init__(self, path: Path):
        self.path = path
        self._file: int | None = None

    @property
    def held(self) -> bool:
        return self._file is not None

    def take(self) -> None:
        """Raises EngineError where another process writes."""
        if self._file is not None:
            return
        file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            who = os.read(file, 32).decode(errors="replace").strip() or "unknown"
            os.close(file)
            raise EngineError(
                f"{self.path.parent}: another process (number {who}) writes to this index; stop it, add through its "
                f"`vlp serve`, or keep the index on a server"
            ) from error
        os.ftruncate(file, 0)
        os.pwrite(file, f"{os.getpid()}\n".encode(), 0)
        self._file = file

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None
