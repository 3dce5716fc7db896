"""The interface of index engines. An engine is a class derived from `IndexEngine`, here or in a user's own file.

An index has items. Each has an id, a unit vector, and a few plain fields. Engines are for searching items that users add and
delete; evaluations multiply matrices instead. A stamp beside the vectors says which model computed them, so that vectors of
another model are refused.
"""

from __future__ import annotations

import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np

from fastvlp.errors import UserError
from fastvlp.extensions import variants
from fastvlp.search.addresses import shown
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
# Equal pictures that are embedded in different batches differ in the last bits.
DECIMALS = 4


@dataclass(frozen=True, kw_only=True)
class Stamp:
    """The model that computed the vectors of an index.

    Attributes:
        fingerprint: Fingerprint of the export (`Embedder.fingerprint`).
        width: Dimension of the vectors.
        model: Name of the model, for messages.
        format: Version of the format of the index.
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
    """An open index. Only one thread may use it at a time.

    Callers use `add`, `delete`, `search` and `get`, which check their arguments and then call `_add`, `_delete`, `_search`
    and `_get` of the engine. All of them raise UserError for invalid arguments, and EngineError if the engine fails.

    Attributes:
        prefixes: Beginnings of the engine's addresses, such as `codes:`. An empty prefix means the path of a folder.
        address: The form of its addresses, for help and errors.
        small: Largest size of a small index: the number of items times the dimension of the vectors (with 512 dimensions,
            65,536 items). In a small index a query is compared with every vector. In a larger one an engine may use a graph,
            which is faster but may miss items.
        stamp: The model that computed the vectors.
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
            stamp: Stamp of the model that will search; None accepts an index of any model. Use `checked_stamp` to compare it.
            create: Make an empty index with this stamp if there is none.

        Raises:
            UserError: There is no index, it belongs to another model, or a package that the engine needs is missing.
        """

    @abstractmethod
    def _add(self, ids: Sequence[str], vectors: np.ndarray, infos: Sequence[Mapping[str, Scalar]]) -> None:
        """Stores items. An existing item with one of the ids is replaced completely. `vectors`: float32 [n width]."""

    @abstractmethod
    def _delete(self, ids: Sequence[str]) -> int:
        """Deletes items, and returns how many of them existed. `ids` has no id twice."""

    @abstractmethod
    def _search(
        self, vectors: np.ndarray, k: int, offset: int, where: Mapping[str, Sequence[Scalar]]
    ) -> list[list[Hit]]:
        """Finds the `k` nearest items after the first `offset`, best first, for each row of `vectors`, float32 [q width].
        `where`: for each field a list of values; an item must have one of them."""

    @abstractmethod
    def _get(self, ids: Sequence[str]) -> Iterable[Item]:
        """Yields the items with these ids that exist, in any order. `ids` has no id twice."""

    @abstractmethod
    def count(self) -> int:
        """Returns the number of items."""

    @abstractmethod
    def close(self) -> None:
        """Closes files and connections."""

    def calibration(self) -> Calibration | None:
        """Returns the calibration of cosines that is stored in the index; None if there is none."""
        return None

    def calibrate(self, calibration: Calibration) -> bool:
        """Stores a calibration of cosines. Returns False if the engine cannot store it."""
        return False

    def is_small(self, items: int) -> bool:
        """Whether an index of this number of items is small, so that a query is compared with every item."""
        return items * self.stamp.width <= self.small

    @classmethod
    def pictures(cls, uri: str) -> PictureStore | None:
        """Returns the default store of the small pictures of an index's items; None if the engine has none."""
        return None

    def add(self, ids: Sequence[str], vectors: np.ndarray, infos: Sequence[Mapping[str, Scalar]]) -> None:
        """Adds items. An existing item with one of the ids is replaced completely.

        When the call returns, all items are stored permanently. If it is interrupted, some of them may be stored.

        Args:
            ids: A text for each item; all different.
            vectors: Unit vectors [n width].
            infos: Fields of each item: texts, finite numbers, true or false.
        """
        self._add(ids, check_items(ids, vectors, infos, self.stamp.width), infos)

    def delete(self, ids: Sequence[str]) -> int:
        """Deletes items, and returns how many of them existed."""
        return self._delete(storable_ids(ids))

    def search(self, vectors: np.ndarray, k: int, where: Where | None = None, offset: int = 0) -> list[list[Hit]]:
        """Finds the nearest items. In a large index engines search approximately and may miss an item.

        Args:
            vectors: Unit vectors [q width], one for each query.
            k: Number of items to return for each query.
            where: Fields that an item must have, each with a value, or with a list of values, one of which it must have.
            offset: Number of best items to skip.

        Returns:
            A list of hits for each query, best first.
        """
        query, choices = check_rows(vectors, self.stamp.width), check_where(where)
        check_depth(k, offset)
        if not len(query) or not all(choices.values()):
            return [[] for _ in query]
        return self._search(query, k, offset, choices)

    def get(self, ids: Sequence[str]) -> list[Item]:
        """Returns the items with these ids that exist, in the order of the ids."""
        unique = storable_ids(ids)
        items = {item.id: item for item in self._get(unique)}
        return [items[id] for id in unique if id in items]


def checked_stamp(stored: Mapping[str, object] | None, wanted: Stamp | None, place: str) -> Stamp:
    """Returns the stamp that is stored in an index, after comparing it with the wanted stamp.

    Args:
        stored: Fields of a Stamp, as `dataclasses.asdict` returns them; None if nothing is stored.
        wanted: Stamp of the model that will search; None accepts any stamp.
        place: Name of the index in errors.

    Raises:
        UserError: The index was made with another model, by another program, or by a newer version.
    """
    names = set(Stamp.__dataclass_fields__)
    if stored is None or not names <= stored.keys():
        raise UserError(
            f"{place}: made by another program, it does not say which model its vectors are from; choose another address"
        )
    stamp = Stamp(**{name: stored[name] for name in names})  # type: ignore[arg-type]
    if stamp.format > FORMAT:
        raise UserError(f"{place}: made by a newer fastvlp (format {stamp.format}, this one {FORMAT}); upgrade fastvlp")
    if wanted is not None and (stamp.fingerprint, stamp.width) != (wanted.fingerprint, wanted.width):
        raise UserError(
            f"{place}: has vectors of another model, {stamp.model or 'unnamed'} ({stamp.fingerprint[:8]}), not of "
            f"{wanted.model or 'unnamed'} ({wanted.fingerprint[:8]}); give the export of the former, or build another index"
        )
    return stamp


def vector_keys(vectors: np.ndarray) -> list[str]:
    """Returns a text for each vector [n E], the same for those that are equal to about four decimals.

    Engines whose graph links neighbours need it. Equal vectors link only to each other there, so that what lies behind them is
    not found (hnswlib issue 341). So the graph has one node for all items with the same vector, and the engine keeps the others
    beside it.
    """
    # The sum makes -0 a 0.
    rounded = np.round(np.asarray(vectors, np.float32), DECIMALS) + np.float32(0)
    return [hashlib.blake2b(row.tobytes(), digest_size=16).hexdigest() for row in rounded]


def engines() -> list[type[IndexEngine]]:
    """Lists the engines of this package and those of files that the user imported."""
    return variants(IndexEngine, PACKAGE)


def addresses() -> str:
    """Describes the addresses of all engines."""
    return "; ".join(sorted(engine.address for engine in engines()))


def engine_of(uri: str) -> type[IndexEngine]:
    """Finds the engine of an address: of all engines whose prefix fits, the one with the longest prefix.

    Raises:
        UserError: No engine or two engines have addresses of this form.
    """
    lengths = {
        engine: max((len(prefix) for prefix in engine.prefixes if uri.startswith(prefix)), default=-1)
        for engine in engines()
    }
    longest = max(lengths.values())
    # An address that begins with a word and a colon names an engine, unless there is a folder of that name.
    if longest < 0 or (longest == 0 and re.match(r"[a-z][a-z0-9+.-]+:", uri) and not Path(uri).exists()):
        raise UserError(
            f"{shown(uri)}: no index engine has addresses of this form; an index is {addresses()}. Import your own engine with "
            f"`vlp --import FILE.py ...`"
        )
    chosen = [engine for engine, length in lengths.items() if length == longest]
    if len(chosen) > 1:
        names = " and ".join(f"{engine.__module__}.{engine.__name__}" for engine in chosen)
        raise UserError(f"{shown(uri)}: {names} both have addresses of this form; give one of them another prefix")
    return chosen[0]


def open_index(uri: str, stamp: Stamp | None = None, create: bool = False) -> IndexEngine:
    """Opens an index.

    Args:
        uri: Address: a folder (Chroma); http(s)://HOST:PORT/NAME?tenant=T&database=D of a Chroma server;
            qdrant://HOST:PORT/COLLECTION or qdrant+https://... of a Qdrant server;
            postgresql://USER@HOST/DATABASE#TABLE with pgvector; codes:FOLDER for a folder that `vlp embed` wrote,
            read-only; or the address of an engine in a file that was imported.
        stamp: Stamp of the model that will search (`Embedder.stamp`); None accepts an index of any model.
        create: Make an empty index with this stamp if there is none.

    Raises:
        UserError: There is no index, it belongs to another model, or a package that the engine needs is missing.
    """
    if create and stamp is None:
        raise ValueError("`create` needs the `stamp` of the model whose vectors the index will have")
    return engine_of(uri)(uri, stamp, create)


def pictures_of(uri: str, folder: str | Path | None = None) -> PictureStore | None:
    """Returns the store of the pictures of an index's items: `folder` if it is given, else the default of the engine; None if
    the engine has none."""
    return engine_of(uri).pictures(uri) if folder is None else PictureFolder(folder)
