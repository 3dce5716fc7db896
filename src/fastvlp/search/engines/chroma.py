"""An index kept by Chroma: embedded in a folder, or by the same client on its server (and so on its distributed edition).

Chroma is given every vector, so that it never loads an embedder of its own, and is set to report nothing to anybody.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import urlsplit

import numpy as np

from fastvlp.data.streams import blocks
from fastvlp.errors import UserError, install
from fastvlp.search.checks import EngineError, Scalar
from fastvlp.search.engines.interface import Hit, IndexEngine, Item, Stamp, checked_stamp
from fastvlp.search.writer_lock import WriterLock

if TYPE_CHECKING:
    from fastvlp.search.pictures import PictureStore

# Of the graph (HNSW, arXiv 1603.09320). Rows are of length one, so that their product is the cosine.
GRAPH = {"space": "ip", "ef_construction": 128, "max_neighbors": 24, "ef_search": 128}
# Ids of one request: SQLite takes 32,766 variables, and a server has a limit of its own.
CHUNK = 2000
FILE = "chroma.sqlite3"


class ChromaIndex(IndexEngine):
    """In a folder one process at a time writes. Others may read; they see what was written since at their next search."""

    prefixes = ("", "http://", "https://")
    address = "a folder; http://HOST:PORT/NAME of a Chroma server"

    def __init__(self, uri: str, stamp: Stamp | None = None, create: bool = False):
        self.uri = uri
        self.folder = None if "://" in uri else Path(uri)
        # Its time of change tells other processes that something was written.
        self._mark = self.folder / "written" if self.folder else None
        self._lock = WriterLock(self.folder / "writer.lock") if self.folder else None
        if self.folder and not create and not (self.folder / FILE).exists():
            from fastvlp.search.embedded import PLAN

            if (self.folder / PLAN).exists():
                raise UserError(f"{uri}: no index but a folder of `vlp embed`; search it as codes:{uri}")
            raise UserError(f"{uri}: no index here; make one with `vlp index build {uri} EMBEDDED`")
        self._open(stamp, create)
        self._last_write = self._written()

    @classmethod
    def pictures(cls, uri: str) -> PictureStore | None:
        from fastvlp.search.pictures import PictureFolder

        return None if "://" in uri else PictureFolder(Path(uri) / "pictures")

    def _open(self, stamp: Stamp | None, create: bool) -> None:
        try:
            self._client = self._connect()
        except UserError:
            raise
        except Exception as error:  # the engine raises what its parts raise, ValueError for a server that is not there
            raise self._engine_error(error) from error
        with self._engine_errors():
            name = self._name()
            if create and stamp is not None and name not in {one.name for one in self._client.list_collections()}:
                # Atomic: a collection is there with its stamp or not at all.
                self._client.create_collection(
                    name,
                    embedding_function=None,
                    configuration=cast(Any, {"hnsw": GRAPH}),
                    metadata=asdict(stamp),
                    get_or_create=True,
                )
            try:
                self._collection = self._client.get_collection(name, embedding_function=None)
            except Exception as error:
                if "not found" not in str(error).lower() and "does not exist" not in str(error).lower():
                    raise
                raise UserError(f"{self.uri}: no index here; make one with `vlp index build`") from error
        self.stamp = checked_stamp(self._collection.metadata, stamp, self.uri)

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
    def _engine_errors(self) -> Iterator[None]:
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            raise self._engine_error(error) from error

    def _engine_error(self, error: Exception) -> EngineError:
        what = f"{self.uri}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        remedy = "is the disk full, or the folder damaged? Restore it, or build the index again"
        return EngineError(f"{what}; {remedy if self.folder else 'is a Chroma server running there?'}")

    def _written(self) -> int:
        """When a process last wrote to the folder."""
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
            try:
                yield
            finally:
                if self._mark is not None:
                    self._mark.touch()
                    self._last_write = self._written()

    def _refresh(self) -> None:
        """The engine keeps its graph in memory and does not notice what other processes write."""
        if (now := self._written()) != self._last_write:
            self._client.close()
            try:
                self._open(self.stamp, create=False)
            except UserError as error:
                raise EngineError(str(error)) from error
            self._last_write = now

    def _add(self, ids: Sequence[str], vectors: np.ndarray, infos: Sequence[Mapping[str, Scalar]]) -> None:
        with self._writing():
            for part in blocks(len(ids), CHUNK):
                present = self._collection.get(ids=list(ids[part]), include=["metadatas"])
                # An item that is replaced would keep its old fields beside the new ones.
                old = {id: dict.fromkeys(info or ()) for id, info in zip(present["ids"], present["metadatas"] or ())}
                merged = [{**old.get(id, {}), **info} or None for id, info in zip(ids[part], infos[part])]
                self._collection.upsert(ids=list(ids[part]), embeddings=vectors[part], metadatas=cast(Any, merged))

    def _delete(self, ids: Sequence[str]) -> int:
        count = 0
        with self._writing():
            for part in blocks(len(ids), CHUNK):
                present = self._collection.get(ids=list(ids[part]), include=[])["ids"]
                if present:
                    self._collection.delete(ids=present)
                    count += len(present)
        return count

    def _search(
        self, vectors: np.ndarray, k: int, offset: int, where: Mapping[str, Sequence[Scalar]]
    ) -> list[list[Hit]]:
        self._refresh()
        with self._engine_errors():
            answer = self._collection.query(
                query_embeddings=vectors,
                n_results=k + offset,
                where=_condition(where),
                include=["metadatas", "distances"],
            )
        infos, distances = answer["metadatas"] or [], answer["distances"] or []
        return [
            [Hit(id, 1 - distance, dict(info or {})) for id, distance, info in zip(*row)][offset:]
            for row in zip(answer["ids"], distances, infos)
        ]

    def count(self) -> int:
        self._refresh()
        with self._engine_errors():
            return int(self._collection.count())

    def _get(self, ids: Sequence[str]) -> Iterable[Item]:
        self._refresh()
        items: list[Item] = []
        with self._engine_errors():
            for part in blocks(len(ids), CHUNK):
                answer = self._collection.get(ids=list(ids[part]), include=["embeddings", "metadatas"])
                vectors, infos = np.asarray(answer["embeddings"], np.float32), answer["metadatas"] or []
                items += [Item(id, vector, dict(info or {})) for id, vector, info in zip(answer["ids"], vectors, infos)]
        return items

    def close(self) -> None:
        self._client.close()
        if self._lock is not None:
            self._lock.close()


def _condition(where: Mapping[str, Sequence[Scalar]]) -> Any:
    """Returns a filter in Chroma's language; None where there is none."""
    # The values of one $in are of one type.
    terms = [
        {name: {"$in": values}} if len({*map(type, values)}) == 1 else {"$or": [{name: value} for value in values]}
        for name, values in where.items()
    ]
    return terms[0] if len(terms) == 1 else {"$and": terms} if terms else None
