"""An index kept by Chroma: embedded in a folder, or by the same client on its server (and so on its distributed edition).

Chroma is given every vector, so that it never loads an embedder of its own, and is told to report nothing to anybody.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

import numpy as np

from fastvlp.data.streams import blocks
from fastvlp.errors import UserError, install
from fastvlp.search.index import (
    CODES,
    EngineError,
    Hit,
    Item,
    Scalar,
    Stamp,
    Where,
    WriterLock,
    agreed,
    as_fields,
    choices,
    fitting,
    page,
    possible,
    rows,
)

# Of the graph (HNSW, arXiv 1603.09320). Rows are of length one, so that their product is the cosine.
GRAPH = {"space": "ip", "ef_construction": 128, "max_neighbors": 24, "ef_search": 128}
# Ids of one request: SQLite takes 32,766 variables, and a server has a limit of its own.
CHUNK = 2000
FILE = "chroma.sqlite3"


class ChromaIndex:
    """In a folder one process at a time writes. Others may read; they see what was written since at their next search."""

    def __init__(self, uri: str, stamp: Stamp | None, create: bool):
        self.uri = uri
        self.folder = None if "://" in uri else Path(uri)
        self._mark = self.folder / "written" if self.folder else None
        self._lock = WriterLock(self.folder / "writer.lock") if self.folder else None
        if self.folder and not create and not (self.folder / FILE).exists():
            from fastvlp.search.bulk import PLAN

            if (self.folder / PLAN).exists():
                raise UserError(f"{uri}: no index but a folder of `vlp embed`; search it as {CODES}{uri}")
            raise UserError(f"{uri}: no index here; make one with `vlp index build {uri} EMBEDDED`")
        self._open(stamp, create)
        self._seen = self._written()

    def _open(self, stamp: Stamp | None, create: bool) -> None:
        try:
            self._client = self._connect()
        except UserError:
            raise
        except Exception as error:  # the engine raises what its parts raise, ValueError for a server that is not there
            raise self._explained(error) from error
        with self._asking():
            name = self._name()
            if create and stamp is not None and name not in {one.name for one in self._client.list_collections()}:
                # Atomic: a collection is there with its stamp or not at all.
                self._client.create_collection(
                    name,
                    embedding_function=None,
                    configuration=cast(Any, {"hnsw": GRAPH}),
                    metadata=as_fields(stamp),
                    get_or_create=True,
                )
            try:
                self._collection = self._client.get_collection(name, embedding_function=None)
            except Exception as error:
                if "not found" not in str(error).lower() and "does not exist" not in str(error).lower():
                    raise
                raise UserError(f"{self.uri}: no index here; make one with `vlp index build`") from error
        self.stamp = agreed(self._collection.metadata, stamp, self.uri)

    def _connect(self) -> Any:
        try:
            import chromadb
            from chromadb.config import Settings
        except ImportError as error:
            raise UserError(f"an index needs Chroma: {install('serve')}") from error
        quiet = Settings(anonymized_telemetry=False)
        if self.folder is not None:
            return chromadb.PersistentClient(str(self.folder), settings=quiet)
        place = urlsplit(self.uri)
        tls = place.scheme == "https"
        headers = {"Authorization": f"Bearer {place.password}"} if place.password else {}
        port = place.port or (443 if tls else 8000)
        return chromadb.HttpClient(place.hostname or "", port, ssl=tls, headers=headers, settings=quiet)

    def _name(self) -> str:
        return "items" if self.folder else urlsplit(self.uri).path.strip("/") or "fastvlp"

    @contextmanager
    def _asking(self) -> Iterator[None]:
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            raise self._explained(error) from error

    def _explained(self, error: Exception) -> EngineError:
        told = f"{self.uri}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        asked = "is the disk full, or the folder damaged? Restore it, or build the index again"
        return EngineError(f"{told}; {asked if self.folder else 'is a Chroma server running there?'}")

    def _written(self) -> int:
        """When a process last wrote to the folder."""
        try:
            return self._mark.stat().st_mtime_ns if self._mark else 0
        except FileNotFoundError:
            return 0

    @contextmanager
    def _writing(self) -> Iterator[None]:
        with self._asking():
            if self._lock is not None:
                self._lock.take()
            self._refresh()
            try:
                yield
            finally:
                if self._mark is not None:
                    self._mark.touch()
                    self._seen = self._written()

    def _refresh(self) -> None:
        """The engine keeps its graph in memory and does not notice what other processes write."""
        if (now := self._written()) != self._seen:
            self._client.close()
            try:
                self._open(self.stamp, create=False)
            except UserError as error:
                raise EngineError(str(error)) from error
            self._seen = now

    def add(self, ids: Sequence[str], vectors: np.ndarray, infos: Sequence[Mapping[str, Scalar]]) -> None:
        found = fitting(ids, vectors, infos, self.stamp.width)
        with self._writing():
            for part in blocks(len(ids), CHUNK):
                told = self._collection.get(ids=list(ids[part]), include=["metadatas"])
                # An item that is replaced would keep its old fields beside the new ones.
                old = {id: dict.fromkeys(info or ()) for id, info in zip(told["ids"], told["metadatas"] or ())}
                merged = [{**old.get(id, {}), **info} or None for id, info in zip(ids[part], infos[part])]
                self._collection.upsert(ids=list(ids[part]), embeddings=found[part], metadatas=cast(Any, merged))

    def delete(self, ids: Sequence[str]) -> int:
        unique, count = possible(ids), 0
        with self._writing():
            for part in blocks(len(unique), CHUNK):
                present = self._collection.get(ids=unique[part], include=[])["ids"]
                if present:
                    self._collection.delete(ids=present)
                    count += len(present)
        return count

    def search(self, vectors: np.ndarray, k: int, where: Where | None = None, offset: int = 0) -> list[list[Hit]]:
        query, most, asked = rows(vectors, self.stamp.width), page(k, offset), choices(where)
        if not len(query) or not all(asked.values()):
            return [[] for _ in query]
        self._refresh()
        with self._asking():
            told = self._collection.query(
                query_embeddings=query, n_results=most, where=_filter(asked), include=["metadatas", "distances"]
            )
        infos, distances = told["metadatas"] or [], told["distances"] or []
        return [
            [Hit(id, 1 - distance, dict(info or {})) for id, distance, info in zip(*row)][offset:]
            for row in zip(told["ids"], distances, infos)
        ]

    def count(self) -> int:
        self._refresh()
        with self._asking():
            return self._collection.count()

    def get(self, ids: Sequence[str]) -> list[Item]:
        self._refresh()
        found: dict[str, Item] = {}
        unique = possible(ids)
        with self._asking():
            for part in blocks(len(unique), CHUNK):
                told = self._collection.get(ids=unique[part], include=["embeddings", "metadatas"])
                vectors, infos = np.asarray(told["embeddings"], np.float32), told["metadatas"] or []
                for id, vector, info in zip(told["ids"], vectors, infos):
                    found[id] = Item(id, vector, dict(info or {}))
        return [found[id] for id in unique if id in found]

    def close(self) -> None:
        self._client.close()
        if self._lock is not None:
            self._lock.close()


def _filter(asked: Mapping[str, list[Scalar]]) -> Any:
    # The values of one $in are of one type.
    terms = [
        {name: {"$in": values}} if len({*map(type, values)}) == 1 else {"$or": [{name: value} for value in values]}
        for name, values in asked.items()
    ]
    return terms[0] if len(terms) == 1 else {"$and": terms} if terms else None
