"""An index in a Chroma database: in a folder, which this process opens, or on a Chroma server (also the distributed edition).

Chroma is given every vector, so that it never loads an embedder of its own. Its telemetry is off.

An index consists of two collections. The first has one item for each distinct vector, and is searched by a graph. The second,
`-copies`, has the further items of these vectors: many equal vectors in a graph would hide their neighbours
(`vector_keys`). A small index in a folder is searched in memory, without the graph.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastvlp.data.streams import blocks
from fastvlp.errors import UserError, install
from fastvlp.search.addresses import shown
from fastvlp.search.calibration import FIELD as CALIBRATION
from fastvlp.search.calibration import Calibration
from fastvlp.search.checks import OWN_FIELDS, EngineError, Scalar
from fastvlp.search.chroma_server import Limits, collection_name, connect, limits, remedy
from fastvlp.search.engines.interface import Hit, IndexEngine, Item, Stamp, checked_stamp, vector_keys
from fastvlp.search.exact import ExactItems, fits
from fastvlp.writer_lock import WriterLock

if TYPE_CHECKING:
    from fastvlp.search.pictures import PictureStore

# Settings of the graph (HNSW, arXiv 1603.09320). Vectors have length one, so that their product is the cosine.
GRAPH = {"space": "ip", "ef_construction": 128, "max_neighbors": 24, "ef_search": 128}
# Settings of the collection of copies, whose graph is never searched: the smallest possible.
NO_GRAPH = {"space": "ip", "ef_construction": 4, "max_neighbors": 2}
# Fields that the engine adds to an item: the key of its vector, and whether the vector has copies.
KEY, COPIED = f"{OWN_FIELDS}vector", f"{OWN_FIELDS}copied"
FILE = "chroma.sqlite3"
# Messages of SQLite about a file that it may not write.
_READ_ONLY = re.compile("read-?only|unable to open database", re.IGNORECASE)


class ChromaIndex(IndexEngine):
    """An index of Chroma. Only one process at a time may write to a folder. Other processes may read it, and see the changes at
    their next search."""

    prefixes = ("", "http://", "https://")
    address = "a folder; http://HOST:PORT/NAME?tenant=T&database=D of a Chroma server"

    def __init__(self, uri: str, stamp: Stamp | None = None, create: bool = False):
        self.uri, self._address = shown(uri), uri
        # Chroma keeps a client for each path in this process, also after the current folder has changed.
        self.folder = None if "://" in uri else Path(uri).absolute()
        self._limits = Limits() if self.folder else limits(uri)
        # The modification time of this file tells other processes that the index was changed.
        self._mark = self.folder / "written" if self.folder else None
        self._lock = WriterLock(self.folder / "writer.lock", self._refusal) if self.folder else None
        if self.folder and not create and not (self.folder / FILE).exists():
            from fastvlp.search.embedded import PLAN

            if (self.folder / PLAN).exists():
                raise UserError(f"{uri}: not an index but a folder of `vlp embed`; search it as codes:{uri}")
            raise UserError(f"{uri}: no index here; make one with `vlp index build {uri} EMBEDDED`")
        self._open(stamp, create)
        self._last_write = self._written()

    @classmethod
    def pictures(cls, uri: str) -> PictureStore | None:
        from fastvlp.search.pictures import PictureFolder

        return None if "://" in uri else PictureFolder(Path(uri).absolute() / "pictures")

    def _open(self, stamp: Stamp | None, create: bool) -> None:
        # All items of a small index; None if there are many items, or if they were not read yet.
        self._small: ExactItems | None = None
        # Whether it is known if the index is small.
        self._measured = False
        try:
            self._client = self._connect()
        except UserError:
            raise
        except Exception as error:  # Chroma raises many types of errors, such as ValueError if no server answers
            raise self._engine_error(error) from error
        with self._engine_errors():
            self._collection = self._find(self._name())
            if self._collection is None and create and stamp is not None:
                self._make(f"{self._name()}-copies", NO_GRAPH, {OWN_FIELDS: "copies"})
                # The collection and its stamp are made in one call, so that neither exists without the other.
                self._collection = self._make(self._name(), GRAPH, asdict(stamp))
            if self._collection is None:
                raise UserError(f"{self.uri}: no index here; make one with `vlp index build`")
            self._copies = self._find(f"{self._name()}-copies")
        self.stamp = checked_stamp(self._collection.metadata, stamp, self.uri)

    def _find(self, name: str) -> Any:
        try:
            return self._client.get_collection(name, embedding_function=None)
        except Exception as error:
            if "not found" not in str(error).lower() and "does not exist" not in str(error).lower():
                raise
            return None

    def _make(self, name: str, graph: Mapping[str, Any], metadata: Mapping[str, Any]) -> Any:
        return self._client.create_collection(
            name, embedding_function=None, configuration={"hnsw": graph}, metadata=dict(metadata), get_or_create=True
        )

    def _connect(self) -> Any:
        try:
            import chromadb
            from chromadb.config import Settings
        except ImportError as error:
            raise UserError(f"an index needs Chroma: {install('serve')}") from error
        quiet = Settings(anonymized_telemetry=False)
        if self.folder is not None:
            return chromadb.PersistentClient(str(self.folder), settings=quiet)
        return connect(self._address, quiet)

    def _name(self) -> str:
        return "items" if self.folder else collection_name(self._address)

    @contextmanager
    def _engine_errors(self) -> Iterator[None]:
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            raise self._engine_error(error) from error

    def _engine_error(self, error: Exception) -> EngineError:
        what = f"{self.uri}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        if self.folder is None:
            return EngineError(f"{what}; {remedy(error)}")
        advice = "is the disk full, or the folder damaged? Restore it, or build the index again"
        if _READ_ONLY.search(str(error)) or not os.access(self.folder, os.W_OK):
            advice = "Chroma writes to the folder even in a search; get the permission, or search in a copy of it"
        return EngineError(f"{what}; {advice}")

    def _refusal(self, holder: str) -> EngineError:
        return EngineError(
            f"{self.uri}: another process (id {holder}) writes to this index; stop it, add items through its `vlp serve`, "
            f"or keep the index on a server"
        )

    def _written(self) -> int:
        """Returns the time at which a process last wrote to the folder."""
        try:
            return self._mark.stat().st_mtime_ns if self._mark else 0
        except FileNotFoundError:
            return 0

    @contextmanager
    def _writing(self) -> Iterator[None]:
        with self._engine_errors():
            if self._lock is not None:
                self._lock.take()
            self._refresh()
            if self._copies is None:  # an index of an earlier version, which had no collection of copies
                self._copies = self._make(f"{self._name()}-copies", NO_GRAPH, {OWN_FIELDS: "copies"})
            try:
                yield
            finally:
                if self._mark is not None:
                    self._mark.touch()
                    self._last_write = self._written()

    def _refresh(self) -> None:
        """Opens the index again if another process has written to it: Chroma keeps its graph in memory and would not notice."""
        if (now := self._written()) != self._last_write:
            self._client.close()
            try:
                self._open(self.stamp, create=False)
            except UserError as error:
                raise EngineError(str(error)) from error
            self._last_write = now

    def _add(self, ids: Sequence[str], vectors: np.ndarray, infos: Sequence[Mapping[str, Scalar]]) -> None:
        with self._writing():
            for part in blocks(len(ids), self._limits.records):
                self._add_part(list(ids[part]), vectors[part], infos[part])
            if self._small is not None:
                self._small.put(ids, vectors, infos)
                if not self.is_small(len(self._small)):
                    self._small = None

    def _add_part(self, ids: list[str], vectors: np.ndarray, infos: Sequence[Mapping[str, Scalar]]) -> None:
        """Adds or replaces items. After each step a search still finds all items that were in the index before."""
        keys = vector_keys(vectors)
        nodes, copies = _fields(self._collection, ids=ids), _fields(self._copies, ids=ids)
        moved = [id for id, key in zip(ids, keys) if id in nodes and nodes[id].get(KEY) != key]
        self._hand_over(moved, {*ids})
        known = _fields(self._collection, where={KEY: {"$in": list({*keys})}})
        node_of = {str(info[KEY]): id for id, info in known.items() if id not in moved}
        for id, key in zip(ids, keys):
            node_of.setdefault(key, id)
        is_node = [node_of[key] == id for id, key in zip(ids, keys)]
        copied = {node_of[key] for node, key in zip(is_node, keys) if not node}
        copied |= {id for id, info in known.items() if info.get(COPIED)}
        # Chroma keeps fields that an update does not name, so the old fields of a replaced item are set to None.
        full = [
            {**dict.fromkeys(nodes.get(id, {})), **dict.fromkeys(copies.get(id, {})), **info, KEY: key}
            | ({COPIED: True} if node and id in copied else {})
            for id, key, node, info in zip(ids, keys, is_node, infos)
        ]
        self._put(self._collection, ids, vectors, full, [i for i, node in enumerate(is_node) if node])
        if marked := [id for id in copied if not known.get(id, {}).get(COPIED) and id not in ids]:
            self._collection.update(ids=marked, metadatas=[{COPIED: True}] * len(marked))
        self._put(self._copies, ids, vectors, full, [i for i, node in enumerate(is_node) if not node])
        _drop(self._copies, [id for id, node in zip(ids, is_node) if node and id in copies])
        _drop(self._collection, [id for id, node in zip(ids, is_node) if not node and id in nodes])

    @staticmethod
    def _put(
        collection: Any, ids: list[str], vectors: np.ndarray, fields: list[dict[str, Any]], rows: list[int]
    ) -> None:
        if rows:
            collection.upsert(
                ids=[ids[row] for row in rows], embeddings=vectors[rows], metadatas=[fields[row] for row in rows]
            )

    def _hand_over(self, leaving: Sequence[str], changing: set[str]) -> None:
        """Before the items `leaving` lose their nodes, makes a copy of each of their vectors the new node. Copies in
        `changing`, which are being changed too, are not used."""
        for info in _fields(self._collection, ids=leaving).values():
            if not info.get(COPIED):
                continue
            copies = self._copies.get(
                where={KEY: info[KEY]}, limit=len(changing) + 1, include=["embeddings", "metadatas"]
            )
            for id, vector, fields in zip(copies["ids"], copies["embeddings"], copies["metadatas"]):
                if id not in changing:
                    self._collection.upsert(ids=[id], embeddings=[vector], metadatas=[{**fields, COPIED: True}])
                    self._copies.delete(ids=[id])
                    break

    def _delete(self, ids: Sequence[str]) -> int:
        gone: set[str] = set()
        with self._writing():
            for part in blocks(len(ids), self._limits.records):
                some = list(ids[part])
                nodes, copies = _fields(self._collection, ids=some), _fields(self._copies, ids=some)
                self._hand_over([*nodes], {*some})
                _drop(self._collection, [*nodes])
                _drop(self._copies, [*copies])
                gone |= {*nodes, *copies}
            if self._small is not None:
                self._small.delete(gone)
            self._measured = self._small is not None
        return len(gone)

    def _search(
        self, vectors: np.ndarray, k: int, offset: int, where: Mapping[str, Sequence[Scalar]]
    ) -> list[list[Hit]]:
        self._refresh()
        with self._engine_errors():
            if (small := self._few_items()) is not None:
                return [
                    [Hit(small.ids[row], float(score), small.infos[row]) for row, score in zip(*rows_and_scores)][
                        offset:
                    ]
                    for rows_and_scores in small.search(vectors, k + offset, where)
                ]
            return [hits[offset:] for hits in self._search_graph(vectors, k + offset, where)]

    def _few_items(self) -> ExactItems | None:
        """Returns all items of a small index in a folder, else None. Items on a server are not kept in memory, since they may
        change at any time."""
        if not self._measured and self.folder is not None:
            self._small = None
            if self.is_small(self._count()):
                try:
                    items = [*_items(self._copies), *_items(self._collection)]
                except Exception:
                    # While another process writes, Chroma can search but cannot read all vectors. The next search tries again.
                    return None
                self._small = ExactItems(self.stamp.width)
                for item in items:
                    self._small.put([item.id], item.vector[None], [item.info])
            self._measured = True
        return self._small

    def _search_graph(self, vectors: np.ndarray, k: int, where: Mapping[str, Sequence[Scalar]]) -> list[list[Hit]]:
        most = self._limits.results
        if k > most:
            raise UserError(f"{self.uri}: gives the {most} best at most, not {k}; narrow the search with a filter")
        condition = _condition(where)
        if condition is not None:
            # A copy may match the filter even if the item in the graph does not.
            condition = {"$or": [condition, {COPIED: True}]}
        n_results, incomplete = k, len(vectors)
        results: list[list[Hit]] = []
        while incomplete:
            answer = self._collection.query(
                query_embeddings=vectors, n_results=n_results, where=condition, include=["metadatas", "distances"]
            )
            rows = [*zip(answer["ids"], answer["metadatas"], answer["distances"])]
            results = [self._with_copies(vector, row, k, where) for vector, row in zip(vectors, rows)]
            more = n_results < most
            incomplete = sum(more and len(hits) < k and len(row[0]) == n_results for hits, row in zip(results, rows))
            n_results = min(4 * n_results, most)
        return results

    def _with_copies(self, vector_E: np.ndarray, row: Any, k: int, where: Mapping[str, Sequence[Scalar]]) -> list[Hit]:
        """Returns the hits of one query, including the copies of each."""
        hits: dict[str, Hit] = {}
        for id, info, distance in zip(*row):
            if len(hits) >= k:
                break
            if fits(info or {}, where):
                hits[id] = Hit(id, 1 - distance, _own(info))
            if (info or {}).get(COPIED):
                condition = {KEY: info[KEY]}
                if where:
                    condition = {"$and": [condition, _condition(where)]}
                copies = _items(self._copies, where=condition, limit=k)
                hits |= {copy.id: Hit(copy.id, float(copy.vector @ vector_E), copy.info) for copy in copies}
        return sorted(hits.values(), key=lambda hit: -hit.score)[:k]

    def calibration(self) -> Calibration | None:
        self._refresh()
        return Calibration.read(self._collection.metadata)

    def calibrate(self, calibration: Calibration) -> bool:
        with self._writing():
            self._collection.modify(metadata={**self._collection.metadata, CALIBRATION: calibration.to_json()})
        return True

    def count(self) -> int:
        self._refresh()
        with self._engine_errors():
            return self._count()

    def _count(self) -> int:
        return int(self._collection.count()) + (int(self._copies.count()) if self._copies is not None else 0)

    def _get(self, ids: Sequence[str]) -> Iterable[Item]:
        self._refresh()
        items: list[Item] = []
        with self._engine_errors():
            for part in blocks(len(ids), self._limits.records):
                items += [*_items(self._copies, ids=list(ids[part])), *_items(self._collection, ids=list(ids[part]))]
        return items

    def close(self) -> None:
        self._client.close()
        if self._lock is not None:
            self._lock.close()


def _condition(where: Mapping[str, Sequence[Scalar]]) -> Any:
    """Returns a filter in Chroma's query language; None if `where` is empty."""
    # Chroma needs all values of one $in to have the same type.
    terms = [
        {name: {"$in": values}} if len({*map(type, values)}) == 1 else {"$or": [{name: value} for value in values]}
        for name, values in where.items()
    ]
    return terms[0] if len(terms) == 1 else {"$and": terms} if terms else None


def _fields(collection: Any, **which: Any) -> dict[str, dict[str, Scalar]]:
    """Returns the fields of the selected items of a collection, by id."""
    if collection is None or which.get("ids") == []:
        return {}
    answer = collection.get(**which, include=["metadatas"])
    return {id: dict(info or {}) for id, info in zip(answer["ids"], answer["metadatas"])}


def _items(collection: Any, **which: Any) -> list[Item]:
    if collection is None:
        return []
    answer = collection.get(**which, include=["embeddings", "metadatas"])
    vectors = np.asarray(answer["embeddings"], np.float32)
    return [Item(id, vector, _own(info)) for id, vector, info in zip(answer["ids"], vectors, answer["metadatas"])]


def _own(info: Any) -> dict[str, Scalar]:
    """Returns the fields of an item without those that the engine added."""
    return {name: value for name, value in (info or {}).items() if not name.startswith(OWN_FIELDS)}


def _drop(collection: Any, ids: list[str]) -> None:
    if ids:
        collection.delete(ids=ids)
