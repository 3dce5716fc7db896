"""The interface of index engines. An engine is a class derived from `IndexEngine`, here or in a user's own file.

An index holds items: an id, a unit vector, and a few plain fields. An engine is for search in items that people add and
delete; evaluation multiplies matrices. A stamp beside the vectors says which model they are of, so that those of another
model are refused.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np

from fastvlp.errors import UserError
from fastvlp.extensions import variants
from fastvlp.search.calibration import Calibration
from fastvlp.search.checks import (
    Scalar,
    Where,
    check_depth,
    check_items,
    check_rows,
    check_where,
    storable_ids,
)
from fastvlp.search.pictures import PictureFolder, PictureStore

PACKAGE = "fastvlp.search.engines"
FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Stamp:
    """Says which model the vectors of an index are of.

    Attributes:
        fingerprint: Of the export (`Embedder.fingerprint`).
        width: Numbers of a vector.
        model: Name of the model, for people.
        format: Version of the way in which an index is stored.
    """

    fingerprint: str
    width: int
    model: str = ""
    format: int = FORMAT


class Hit(NamedTuple):
    """A result of a search. `score`: the cosine, -1 to 1."""

    id: str
    score: float
    info: dict[str, Scalar]


class Item(NamedTuple):
    """An item of an index. `vector`: float32 [width], of length 1."""

    id: str
    vector: np.ndarray
    info: dict[str, Scalar]


class IndexEngine(ABC):
    """An open index. One thread uses it at a time.

    Callers use `add`, `delete`, `search` and `get`, which check their arguments and then call `_add`, `_delete`, `_search`
    and `_get` of the engine. All of them raise UserError for arguments that no index takes, and EngineError where the
    engine fails.

    Attributes:
        prefixes: How the engine's addresses begin, such as `codes:`; an empty prefix stands for the path of a folder.
        address: The form of its addresses, for help and errors.
        small: Numbers in all its vectors up to which an engine compares a query with every vector (of 512 numbers: 65,536
            vectors). A graph is faster, but may miss items.
        stamp: Which model the vectors are of.
    """

    prefixes: ClassVar[tuple[str, ...]]
    address: ClassVar[str]
    small: ClassVar[int] = 2**25
    stamp: Stamp

    @abstractmethod
    def __init__(self, uri: str, stamp: Stamp | None = None, create: bool = False):
        """Opens the index at `uri`, and sets `self.stamp`.

        Args:
            uri: Address that begins with one of `prefixes`.
            stamp: Of the model that will search; None takes an index of any model. `checked_stamp` compares it.
            create: Makes an empty index of that stamp where there is none.

        Raises:
            UserError: There is no index, it is of another model, or a package that the engine needs is missing.
        """

    @abstractmethod
    def _add(self, ids: Sequence[str], vectors: np.ndarray, infos: Sequence[Mapping[str, Scalar]]) -> None:
        """Stores items. An item that has one of the ids is replaced whole. `vectors`: float32 [n width]."""

    @abstractmethod
    def _delete(self, ids: Sequence[str]) -> int:
        """Deletes items, and returns how many of them there were. `ids`: each once."""

    @abstractmethod
    def _search(
        self, vectors: np.ndarray, k: int, offset: int, where: Mapping[str, Sequence[Scalar]]
    ) -> list[list[Hit]]:
        """Finds the `k` nearest items after the first `offset`, best first, for each row of `vectors`, float32 [q width].
        `where`: for each field the values of which an item must have one."""

    @abstractmethod
    def _get(self, ids: Sequence[str]) -> Iterable[Item]:
        """Yields those of the items that there are, in any order. `ids`: each once."""

    @abstractmethod
    def count(self) -> int:
        """Returns the number of items."""

    @abstractmethod
    def close(self) -> None:
        """Gives up files and connections."""

    def calibration(self) -> Calibration | None:
        """Returns what cosines mean in this index, where the engine keeps it."""
        return None

    def calibrate(self, calibration: Calibration) -> bool:
        """Keeps what cosines mean. Returns whether the engine can."""
        return False

    def is_small(self, items: int) -> bool:
        """Whether so many items are few enough to be compared one by one."""
        return items * self.stamp.width <= self.small

    @classmethod
    def pictures(cls, uri: str) -> PictureStore | None:
        """Returns where the small pictures of an index's items are kept by default; None where it has no place for them."""
        return None

    def add(self, ids: Sequence[str], vectors: np.ndarray, infos: Sequence[Mapping[str, Scalar]]) -> None:
        """Adds items; one that has one of the ids is replaced whole.

        When it returns, all are stored for good. When it is cut short, some are.

        Args:
            ids: A text for each item, no two alike.
            vectors: Unit rows [n width].
            infos: Fields of each item: texts, finite numbers, true or false.
        """
        self._add(ids, check_items(ids, vectors, infos, self.stamp.width), infos)

    def delete(self, ids: Sequence[str]) -> int:
        """Deletes items, and returns how many of them there were."""
        return self._delete(storable_ids(ids))

    def search(self, vectors: np.ndarray, k: int, where: Where | None = None, offset: int = 0) -> list[list[Hit]]:
        """Finds the nearest items. In a large index engines search approximately: an item may be missed.

        Args:
            vectors: Unit rows [q width], one for each query.
            k: How many items to return for each query.
            where: Fields that an item must have, each with a value, or with a list of values of which one will do.
            offset: How many of the best to leave out.

        Returns:
            For each query its hits, best first.
        """
        query, choices = check_rows(vectors, self.stamp.width), check_where(where)
        check_depth(k, offset)
        if not len(query) or not all(choices.values()):
            return [[] for _ in query]
        return self._search(query, k, offset, choices)

    def get(self, ids: Sequence[str]) -> list[Item]:
        """Returns those of the items that there are, in the order of the ids."""
        unique = storable_ids(ids)
        items = {item.id: item for item in self._get(unique)}
        return [items[id] for id in unique if id in items]


def checked_stamp(stored: Mapping[str, object] | None, wanted: Stamp | None, place: str) -> Stamp:
    """Returns the stamp that an index stores, where that is the wanted one.

    Args:
        stored: Fields of a Stamp, as `dataclasses.asdict` gives them; None where nothing is stored.
        wanted: Of the model that will search; None takes any.
        place: Names the index in errors.

    Raises:
        UserError: The index is of another model, of another program, or of a newer version.
    """
    names = set(Stamp.__dataclass_fields__)
    if stored is None or not names <= stored.keys():
        raise UserError(
            f"{place}: made by another program, it does not say which model its vectors are of; choose another place"
        )
    stamp = Stamp(**{name: stored[name] for name in names})  # type: ignore[arg-type]
    if stamp.format > FORMAT:
        raise UserError(f"{place}: made by a newer fastvlp (format {stamp.format}, this one {FORMAT}); upgrade fastvlp")
    if wanted is not None and (stamp.fingerprint, stamp.width) != (wanted.fingerprint, wanted.width):
        raise UserError(
            f"{place}: has vectors of another model, {stamp.model or 'unnamed'} ({stamp.fingerprint[:8]}), not of "
            f"{wanted.model or 'unnamed'} ({wanted.fingerprint[:8]}); give that one's export, or build another index"
        )
    return stamp


def engines() -> list[type[IndexEngine]]:
    """Lists the engines of this package and those of files that the user imported."""
    return variants(IndexEngine, PACKAGE)


def addresses() -> str:
    """Describes the addresses of all engines."""
    return "; ".join(sorted(engine.address for engine in engines()))


def engine_of(uri: str) -> type[IndexEngine]:
    """Finds the engine of an address: the one with the longest prefix that the address begins with.

    Raises:
        UserError: No engine has addresses of this form, or two have.
    """
    lengths = {
        engine: max((len(prefix) for prefix in engine.prefixes if uri.startswith(prefix)), default=-1)
        for engine in engines()
    }
    longest = max(lengths.values())
    # A word and a colon at the start name an engine, unless there is a folder of that name.
    if longest < 0 or (longest == 0 and re.match(r"[a-z][a-z0-9+.-]+:", uri) and not Path(uri).exists()):
        raise UserError(
            f"{uri}: no index engine has addresses of this form; an index is {addresses()}. For an engine of your own: "
            f"`vlp --import FILE.py ...`"
        )
    chosen = [engine for engine, length in lengths.items() if length == longest]
    if len(chosen) > 1:
        names = " and ".join(f"{engine.__module__}.{engine.__name__}" for engine in chosen)
        raise UserError(f"{uri}: {names} both have addresses of this form; give one of them another prefix")
    return chosen[0]


def open_index(uri: str, stamp: Stamp | None = None, create: bool = False) -> IndexEngine:
    """Opens an index.

    Args:
        uri: Address: a folder (Chroma); http(s)://HOST:PORT/NAME of a Chroma server;
            postgresql://USER@HOST/DATABASE#TABLE with pgvector; codes:FOLDER of what `vlp embed` wrote, read-only; or
            the address of an engine in a file that was imported.
        stamp: Of the model that will search (`Embedder.stamp`); None takes an index of any model.
        create: Makes an empty index of that stamp where there is none.

    Raises:
        UserError: There is no index, it is of another model, or a package that the engine needs is missing.
    """
    if create and stamp is None:
        raise ValueError("`create` needs the `stamp` of the model that the index will be of")
    return engine_of(uri)(uri, stamp, create)


def pictures_of(uri: str, folder: str | Path | None = None) -> PictureStore | None:
    """Returns the pictures of an index's items: those in `folder` where it is given, else where the index's engine has them;
    None where it has no place for them."""
    return engine_of(uri).pictures(uri) if folder is None else PictureFolder(folder)
