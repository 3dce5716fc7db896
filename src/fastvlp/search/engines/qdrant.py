"""An index on a Qdrant server: a collection whose metadata is the stamp. The server divides and replicates it by its own
settings.

If several points have equal vectors, one of them stores its vector under the name `node`, for which Qdrant makes a graph. The
others store theirs under the name `copy`, for which it makes none (`vector_keys`). A filter looks for terms: hashes of a field
and its value. So one index of the payload serves all fields; it must exist before the graph is made. The terms of true and 1
differ, and those of 1 and 1.0 are the same.

Many processes may read and write at once.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from hashlib import blake2b
from itertools import chain
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from fastvlp.data.streams import blocks
from fastvlp.errors import UserError, install
from fastvlp.search.addresses import options_of, shown
from fastvlp.search.calibration import FIELD as CALIBRATION
from fastvlp.search.calibration import Calibration
from fastvlp.search.checks import DEEPEST, EngineError, Scalar
from fastvlp.search.engines.interface import Hit, IndexEngine, Item, Stamp, checked_stamp, vector_keys
from fastvlp.search.exact import fits

# Settings of the graph (HNSW, arXiv 1603.09320).
NEIGHBOURS, CONSTRUCTION, CANDIDATES = 24, 128, 128
# Largest number of vector elements in one request: at twenty bytes each, a third of what a server accepts (32 MB). Largest
# number of ids in one request.
NUMBERS, CHUNK = 2**19, 2000
# Largest number of queries in one request.
QUERIES = 64
# Timeout of a request, in seconds.
TIMEOUT = 60
KEY = "QDRANT_API_KEY"
# Fields of a point. Qdrant takes only numbers and UUIDs as ids, so a point's id is a UUID made from the item's id.
ID, INFO, SAME, COPIED, TERMS = "id", "info", "same", "copied", "terms"
NODE, COPY = "node", "copy"
YES = "yes"
_IDS = uuid.UUID("5d0c6d0e-9c3f-4d0c-8b5e-1f6d9a7c2b41")


class QdrantIndex(IndexEngine):
    """An index in Qdrant. The key is read from the environment variable QDRANT_API_KEY and not from the address, because
    addresses are printed and appear in the list of processes."""

    prefixes = ("qdrant://", "qdrant+https://")
    address = "qdrant://HOST:PORT/COLLECTION or qdrant+https://... of a Qdrant server"

    def __init__(self, uri: str, stamp: Stamp | None = None, create: bool = False):
        self.uri = shown(uri)
        place = urlsplit(uri)
        options_of(uri, known=())
        if place.password or place.username:
            raise UserError(f"{self.uri}: give the key in the environment, as {KEY}, not in the address")
        self._prefix, _, self._name = place.path.strip("/").rpartition("/")
        if not place.hostname or not self._name:
            raise UserError(f"{self.uri}: write {self.address}")
        self._place, self._tls = (place.hostname, place.port or 6333), place.scheme == "qdrant+https"
        self._connect()
        with self._engine_errors():
            found = self._found()
            if found is None and create and stamp is not None:
                self._make(stamp)
                found = self._found()
            if found is None:
                raise UserError(f"{self.uri}: no index here; make one with `vlp index build`")
        self.stamp = checked_stamp(found.config.metadata, stamp, self.uri)

    def _connect(self) -> None:
        try:
            from qdrant_client import QdrantClient, models
        except ImportError as error:
            raise UserError(f"an index in Qdrant needs its client: {install('qdrant')}") from error
        host, port = self._place
        self._models: Any = models
        self._client: Any = QdrantClient(
            host=host,
            port=port,
            https=self._tls,
            prefix=self._prefix or None,
            api_key=os.environ.get(KEY) or None,
            timeout=TIMEOUT,
            check_compatibility=False,
        )

    def _found(self) -> Any:
        """Returns the server's description of the collection; None if there is none."""
        from qdrant_client.http.exceptions import UnexpectedResponse

        try:
            return self._client.get_collection(self._name)
        except UnexpectedResponse as error:
            if error.status_code != 404:
                raise
            return None

    def _make(self, stamp: Stamp) -> None:
        from qdrant_client.http.exceptions import UnexpectedResponse

        m = self._models
        graph = m.HnswConfigDiff(m=NEIGHBOURS, ef_construct=CONSTRUCTION)
        # Vectors have length one, so the product is the cosine. With Distance.COSINE Qdrant would return them rounded.
        vectors = {
            NODE: m.VectorParams(size=stamp.width, distance=m.Distance.DOT, hnsw_config=graph),
            COPY: m.VectorParams(size=stamp.width, distance=m.Distance.DOT, hnsw_config=m.HnswConfigDiff(m=0)),
        }
        try:
            # The collection and its stamp are made in one call, so that neither exists without the other.
            self._client.create_collection(self._name, vectors_config=vectors, metadata=asdict(stamp))
        except UnexpectedResponse as error:
            if error.status_code != 409:  # another process has just made it
                raise
        for field in (TERMS, COPIED):
            self._client.create_payload_index(self._name, field, m.PayloadSchemaType.KEYWORD, wait=True)
        if not (made := self._found()) or not made.config.metadata:
            raise EngineError(
                f"{self.uri}: the server kept no metadata of the collection; it has to be Qdrant 1.16 or newer"
            )

    @contextmanager
    def _engine_errors(self) -> Iterator[None]:
        from qdrant_client.http.exceptions import ApiException, UnexpectedResponse

        try:
            yield
        except UnexpectedResponse as error:
            remedy = f"; is {KEY} set, and right?" if error.status_code in (401, 403) else ""
            raise EngineError(
                f"{self.uri}: the server answered {error.status_code}: {_reason(error)}{remedy}"
            ) from error
        except ApiException as error:
            cause = getattr(error, "source", error)
            raise EngineError(
                f"{self.uri}: {type(cause).__name__}: {cause}; is a Qdrant server running there?"
            ) from error

    def calibration(self) -> Calibration | None:
        with self._engine_errors():
            found = self._found()
        return Calibration.read(found.config.metadata) if found is not None else None

    def calibrate(self, calibration: Calibration) -> bool:
        with self._engine_errors():
            self._client.update_collection(
                self._name, metadata={**asdict(self.stamp), CALIBRATION: calibration.to_json()}
            )
        return True

    def count(self) -> int:
        with self._engine_errors():
            return int(self._client.count(self._name, exact=True).count)

    def close(self) -> None:
        self._client.close()

    def _add(self, ids: Sequence[str], vectors: np.ndarray, infos: Sequence[Mapping[str, Scalar]]) -> None:
        with self._engine_errors():
            for part in blocks(len(ids), max(1, min(CHUNK, NUMBERS // self.stamp.width))):
                self._add_part(ids[part], vectors[part], infos[part])

    def _add_part(self, ids: Sequence[str], vectors: np.ndarray, infos: Sequence[Mapping[str, Scalar]]) -> None:
        """Adds or replaces items. After each step a search still finds all items that were in the index before."""
        keys = vector_keys(vectors)
        key_of = dict(zip(ids, keys))
        leaving = [point for point in self._nodes(ids) if point.payload[SAME] != key_of[point.payload[ID]]]
        self._hand_over(leaving, ids)
        gone = {point.payload[ID] for point in leaving}
        # The item that is the node of each vector, and the nodes that already have copies.
        node_of: dict[str, str] = {}
        copied: set[str] = set()
        for point in self._scroll(self._having(f"{NODE}:{key}" for key in {*keys})):
            if point.payload[ID] not in gone:
                node_of[point.payload[SAME]] = point.payload[ID]
                copied |= {point.payload[ID]} if point.payload.get(COPIED) else set()
        for id, key in key_of.items():
            node_of.setdefault(key, id)
        newly = {node_of[key] for id, key in key_of.items() if node_of[key] != id} - copied
        if before := [_point_id(id) for id in newly if id not in key_of]:
            self._client.set_payload(self._name, {COPIED: YES}, points=before, wait=True)
        points = [
            self._point(id, vector, info, key, NODE if node_of[key] == id else COPY, id in copied | newly)
            for id, vector, info, key in zip(ids, vectors.tolist(), infos, keys)
        ]
        self._client.upsert(self._name, points, wait=True)

    def _point(
        self, id: str, vector: Sequence[float], info: Mapping[str, Scalar], key: str, kind: str, copied: bool
    ) -> Any:
        terms = [f"{kind}:{key}", *(_term(name, value) for name, value in info.items())]
        payload = {ID: id, INFO: dict(info), SAME: key, TERMS: terms} | ({COPIED: YES} if copied else {})
        # An existing point with that id is replaced completely, including its vectors.
        return self._models.PointStruct(id=_point_id(id), vector={kind: list(vector)}, payload=payload)

    def _hand_over(self, leaving: Iterable[Any], changing: Sequence[str]) -> None:
        """For each vector that loses its node, makes one of its copies the new node. Copies that are being changed too are not
        used."""
        others = self._models.HasIdCondition(has_id=[*map(_point_id, changing)])
        for point in leaving:
            if not point.payload.get(COPIED):
                continue
            which = self._having([f"{COPY}:{point.payload[SAME]}"], but=others)
            for heir in self._scroll(which, most=1, vectors=True):
                held = heir.payload
                new = self._point(held[ID], heir.vector[COPY], held[INFO], held[SAME], NODE, copied=True)
                self._client.upsert(self._name, [new], wait=True)

    def _nodes(self, ids: Sequence[str]) -> list[Any]:
        """Returns those of the items that are in the graph."""
        return [*filter(_is_node, self._points(ids))]

    def _points(self, ids: Sequence[str], vectors: bool = False) -> list[Any]:
        return list(
            chain.from_iterable(
                self._client.retrieve(self._name, [*map(_point_id, ids[part])], with_payload=True, with_vectors=vectors)
                for part in blocks(len(ids), CHUNK)
            )
        )

    def _scroll(self, which: Any, most: int = DEEPEST, vectors: bool = False) -> list[Any]:
        return self._client.scroll(self._name, which, limit=most, with_payload=True, with_vectors=vectors)[0]

    def _delete(self, ids: Sequence[str]) -> int:
        deleted = 0
        with self._engine_errors():
            for part in blocks(len(ids), CHUNK):
                points = self._points(ids[part])
                if points:
                    self._hand_over(filter(_is_node, points), ids[part])
                    which = self._models.PointIdsList(points=[point.id for point in points])
                    self._client.delete(self._name, which, wait=True)
                deleted += len(points)
        return deleted

    def _get(self, ids: Sequence[str]) -> Iterable[Item]:
        with self._engine_errors():
            points = self._points(ids, vectors=True)
        return [
            Item(point.payload[ID], np.asarray(next(iter(point.vector.values())), np.float32), point.payload[INFO])
            for point in points
        ]

    def _search(
        self, vectors: np.ndarray, k: int, offset: int, where: Mapping[str, Sequence[Scalar]]
    ) -> list[list[Hit]]:
        hits: list[list[Hit]] = []
        with self._engine_errors():
            exact = self.is_small(self._client.count(self._name, exact=False).count)
            search = self._search_all if exact else self._search_graph
            for part in blocks(len(vectors), QUERIES):
                hits += search(vectors[part], k + offset, where)
        return [found[offset:] for found in hits]

    def _search_all(self, vectors: np.ndarray, k: int, where: Mapping[str, Sequence[Scalar]]) -> list[list[Hit]]:
        which = self._having(where=where)
        asked = [self._query(vector, kind, k, which, exact=True) for kind in (NODE, COPY) for vector in vectors]
        answers = self._answers(asked)
        return [_best([*nodes, *copies], k, where) for nodes, copies in zip(answers, answers[len(vectors) :])]

    def _search_graph(self, vectors: np.ndarray, k: int, where: Mapping[str, Sequence[Scalar]]) -> list[list[Hit]]:
        """Finds the nearest nodes and their copies. If too few of them match the filter, it asks for more."""
        # A copy may match the filter even if its node does not.
        which = self._having(where=where, or_copied=True)
        results: list[list[Hit]] = [[] for _ in vectors]
        asked, unfinished = k, [*range(len(vectors))]
        while unfinished:
            nodes = self._answers([self._query(vectors[row], NODE, asked, which) for row in unfinished])
            copied = [[f"{COPY}:{node.payload[SAME]}" for node in found if node.payload.get(COPIED)] for found in nodes]
            copies = self._answers(
                [
                    self._query(vectors[row], COPY, k, self._having(terms, where), exact=True)
                    for row, terms in zip(unfinished, copied)
                    if terms
                ]
            )
            rest = iter(copies)
            for row, found, terms in zip(unfinished, nodes, copied):
                results[row] = _best([*found, *(next(rest) if terms else [])], k, where)
            full = asked >= DEEPEST
            unfinished = [
                row
                for row, found in zip(unfinished, nodes)
                if len(results[row]) < k and len(found) == asked and not full
            ]
            asked = min(4 * asked, DEEPEST)
        return results

    def _query(self, vector: np.ndarray, kind: str, k: int, which: Any, exact: bool = False) -> Any:
        params = (
            self._models.SearchParams(exact=True) if exact else self._models.SearchParams(hnsw_ef=max(CANDIDATES, k))
        )
        return self._models.QueryRequest(
            query=vector.tolist(),
            using=kind,
            limit=k,
            filter=which,
            params=params,
            with_payload=[ID, INFO, SAME, COPIED],
        )

    def _answers(self, requests: Sequence[Any]) -> list[list[Any]]:
        if not requests:
            return []
        return [answer.points for answer in self._client.query_batch_points(self._name, requests)]

    def _having(
        self,
        terms: Iterable[str] = (),
        where: Mapping[str, Sequence[Scalar]] | None = None,
        or_copied: bool = False,
        but: Any = None,
    ) -> Any:
        """Returns a filter for points that have one of the terms, if any are given, and whose fields have the values, or that
        have copies."""
        m = self._models
        wanted = [[*terms], *([_term(name, value) for value in values] for name, values in (where or {}).items())]
        conditions = [m.FieldCondition(key=TERMS, match=m.MatchAny(any=some)) for some in wanted if some]
        if or_copied and conditions:
            copied = m.FieldCondition(key=COPIED, match=m.MatchAny(any=[YES]))
            return m.Filter(should=[m.Filter(must=conditions), copied])
        return m.Filter(must=conditions, must_not=but and [but]) if conditions else None


def _best(points: Iterable[Any], k: int, where: Mapping[str, Sequence[Scalar]]) -> list[Hit]:
    hits = [
        Hit(point.payload[ID], float(point.score), point.payload[INFO])
        for point in points
        if fits(point.payload[INFO], where)
    ]
    return sorted(hits, key=lambda hit: (-hit.score, hit.id))[:k]


def _point_id(id: str) -> str:
    return str(uuid.uuid5(_IDS, id))


def _is_node(point: Any) -> bool:
    return f"{NODE}:{point.payload[SAME]}" in point.payload[TERMS]


def _term(name: str, value: Scalar) -> str:
    """Returns a short text for a field and its value. It is the same for 1 and 1.0, and another one for true."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return blake2b(json.dumps([name, value]).encode(), digest_size=8).hexdigest()


def _reason(error: Any) -> str:
    """Returns the server's message for an error."""
    try:
        return str(error.structured()["status"]["error"])
    except (ValueError, KeyError, TypeError):
        return str(error.reason_phrase)
