"""Collections kept by Qdrant's own engine (the package qdrant-edge-py), by those calls of the client that the engine needs.

So filters, named vectors and the graph are Qdrant's; only its server, and what it does with several machines, are not.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import qdrant_edge as edge
from qdrant_client import QdrantClient, models
from qdrant_client.http.models import QueryResponse

# Kilobytes of vectors above which there is a graph, and below which it is not used: as little as can be.
LEAST = 1


class QdrantEngine:
    """Stands in for `QdrantClient`. The client's local mode keeps the settings of collections."""

    def __init__(self) -> None:
        self._settings = QdrantClient(":memory:")
        self._folder = tempfile.TemporaryDirectory()
        self.shards: dict[str, edge.EdgeShard] = {}
        self._changed: set[str] = set()
        self.collection_exists = self._settings.collection_exists
        self.get_collection = self._settings.get_collection
        self.update_collection = self._settings.update_collection

    def create_collection(self, name: str, vectors_config: Any, metadata: Any = None) -> bool:
        def graph(given: models.HnswConfigDiff) -> edge.HnswIndexConfig:
            return edge.HnswIndexConfig(given.m, given.ef_construct or 100, LEAST, max_indexing_threads=1)

        vectors = {
            kind: edge.EdgeVectorParams(given.size, edge.Distance.Dot, hnsw_config=graph(given.hnsw_config))
            for kind, given in vectors_config.items()
        }
        optimizers = edge.EdgeOptimizersConfig(indexing_threshold=LEAST, default_segment_number=1)
        config = edge.EdgeConfig(vectors, optimizers=optimizers, max_search_threads=1, wal_enabled=False)
        place = Path(self._folder.name, name)
        place.mkdir()
        self.shards[name] = edge.EdgeShard.create(str(place), config)
        return self._settings.create_collection(name, vectors_config, metadata=metadata)

    def create_payload_index(self, name: str, field: str, kind: str) -> None:
        assert kind == "keyword"
        self._update(name, edge.UpdateOperation.create_field_index(field, edge.PayloadSchemaType.Keyword))

    def _update(self, name: str, operation: Any) -> None:
        self.shards[name].update(operation)
        self._changed.add(name)

    def _shard(self, name: str) -> edge.EdgeShard:
        """The collection, with its graph as a server makes it in time."""
        if name in self._changed:
            self.shards[name].optimize()
            self._changed.remove(name)
        return self.shards[name]

    def upsert(self, name: str, points: Sequence[models.PointStruct]) -> None:
        made = [edge.Point(point.id, point.vector, point.payload) for point in points]
        self._update(name, edge.UpdateOperation.upsert_points(made))

    def delete(self, name: str, which: models.PointIdsList) -> None:
        self._update(name, edge.UpdateOperation.delete_points(which.points))

    def set_payload(self, name: str, payload: dict[str, Any], points: Any) -> None:
        self._update(name, edge.UpdateOperation.set_payload(points, payload))

    def retrieve(self, name: str, ids: Any, with_payload: bool, with_vectors: Any) -> list[models.Record]:
        return [*map(_record, self.shards[name].retrieve(ids, with_payload, bool(with_vectors)))]

    def scroll(
        self, name: str, which: Any = None, limit: int = 100, with_payload: bool = True, with_vectors: Any = False
    ) -> tuple[list[models.Record], Any]:
        asked = edge.ScrollRequest(None, limit, _filter(which), with_payload, bool(with_vectors))
        found, following = self.shards[name].scroll(asked)
        return [*map(_record, found)], following and str(following)

    def count(self, name: str) -> models.CountResult:
        return models.CountResult(count=self.shards[name].count(edge.CountRequest(exact=True)))

    def query_batch_points(self, name: str, requests: Sequence[models.QueryRequest]) -> list[QueryResponse]:
        asked = [
            edge.QueryRequest(
                one.limit,
                query=edge.Query.Nearest(getattr(one.query, "nearest", one.query), one.using),
                with_payload=one.with_payload,
                filter=_filter(one.filter),
                params=edge.SearchParams(one.params.hnsw_ef, bool(one.params.exact)),
            )
            for one in requests
        ]
        return [
            QueryResponse(
                points=[
                    models.ScoredPoint(id=str(hit.id), version=0, score=hit.score, payload=hit.payload) for hit in hits
                ]
            )
            for hits in self._shard(name).query_batch(edge.QueryBatchRequest(asked))
        ]


def _record(found: Any) -> models.Record:
    return models.Record(id=str(found.id), payload=found.payload, vector=found.vector)


def _filter(given: models.Filter | None) -> edge.Filter | None:
    if given is None:
        return None
    return edge.Filter(
        *([*map(_condition, some)] if some else None for some in (given.must, given.should, given.must_not))
    )


def _condition(given: Any) -> Any:
    if isinstance(given, models.Filter):
        return _filter(given)
    if isinstance(given, models.HasIdCondition):
        return edge.HasIdCondition({*given.has_id})
    return edge.FieldCondition(given.key, edge.MatchAny(given.match.any))
