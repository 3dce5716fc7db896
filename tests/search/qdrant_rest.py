"""A server that speaks those of Qdrant's REST endpoints that the engine uses, and keeps points by the client's local mode or by
Qdrant's own engine (tests.search.qdrant_engine). It stands in for a Qdrant server, which no package carries.
"""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from qdrant_client import QdrantClient, models
from qdrant_client.http.models import QueryResponse
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route


class QdrantServer:
    """Attributes:
    address: qdrant://127.0.0.1:PORT.
    api_key: What requests must carry, where it is set.
    requests: Method, path and headers of each request.
    """

    def __init__(self, store: Any) -> None:
        self.store = store
        self.api_key: str | None = None
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        self.address = ""

    def routes(self) -> list[Route]:
        here = "/collections/{name}"
        endpoints: list[tuple[str, str, Callable[[str, dict[str, Any]], Any]]] = [
            ("GET", here, lambda name, _: self.store.get_collection(name)),
            ("PUT", here, self._create),
            ("PATCH", here, lambda name, body: self.store.update_collection(name, metadata=body["metadata"])),
            ("PUT", f"{here}/index", self._index),
            ("PUT", f"{here}/points", self._upsert),
            ("POST", f"{here}/points", self._retrieve),
            ("POST", f"{here}/points/delete", self._delete),
            ("POST", f"{here}/points/payload", self._set_payload),
            ("POST", f"{here}/points/scroll", self._scroll),
            ("POST", f"{here}/points/count", lambda name, _: self.store.count(name)),
            ("POST", f"{here}/points/query/batch", self._query),
        ]
        return [Route(path, self._endpoint(act), methods=[method]) for method, path, act in endpoints]

    def _endpoint(self, act: Callable[[str, dict[str, Any]], Any]) -> Callable[[Request], Awaitable[JSONResponse]]:
        async def answer(request: Request) -> JSONResponse:
            self.requests.append((request.method, request.url.path, dict(request.headers)))
            if self.api_key is not None and request.headers.get("api-key") != self.api_key:
                return JSONResponse({"status": {"error": "Must provide an API key"}}, 401)
            name, made = request.path_params["name"], (request.method, request.url.path.count("/")) == ("PUT", 2)
            if self.store.collection_exists(name) == made:
                return JSONResponse({"status": {"error": f"Collection `{name}`"}}, 409 if made else 404)
            with warnings.catch_warnings(action="ignore"):
                try:
                    result = act(name, await request.json() if request.method != "GET" else {})
                except Exception as error:
                    return JSONResponse({"status": {"error": f"{type(error).__name__}: {error}"}}, 400)
            return JSONResponse({"result": _plain(result), "status": "ok", "time": 0.0})

        return answer

    @staticmethod
    def _updated(_: Any) -> models.UpdateResult:
        return models.UpdateResult(operation_id=0, status=models.UpdateStatus.COMPLETED)

    def _create(self, name: str, body: dict[str, Any]) -> bool:
        asked = models.CreateCollection.model_validate(body)
        return self.store.create_collection(name, vectors_config=asked.vectors, metadata=asked.metadata)

    def _index(self, name: str, body: dict[str, Any]) -> models.UpdateResult:
        return self._updated(self.store.create_payload_index(name, body["field_name"], body["field_schema"]))

    def _upsert(self, name: str, body: dict[str, Any]) -> models.UpdateResult:
        points = models.PointsList.model_validate(body).points
        return self._updated(self.store.upsert(name, points))

    def _retrieve(self, name: str, body: dict[str, Any]) -> list[models.Record]:
        asked = models.PointRequest.model_validate(body)
        return self.store.retrieve(name, asked.ids, with_payload=True, with_vectors=asked.with_vector)

    def _delete(self, name: str, body: dict[str, Any]) -> models.UpdateResult:
        return self._updated(self.store.delete(name, models.PointIdsList.model_validate(body)))

    def _set_payload(self, name: str, body: dict[str, Any]) -> models.UpdateResult:
        asked = models.SetPayload.model_validate(body)
        return self._updated(self.store.set_payload(name, asked.payload, asked.points))

    def _scroll(self, name: str, body: dict[str, Any]) -> dict[str, Any]:
        asked = models.ScrollRequest.model_validate(body)
        points, following = self.store.scroll(
            name, asked.filter, asked.limit, with_payload=True, with_vectors=asked.with_vector
        )
        return {"points": _plain(points), "next_page_offset": following}

    def _query(self, name: str, body: dict[str, Any]) -> list[QueryResponse]:
        return self.store.query_batch_points(name, models.QueryRequestBatch.model_validate(body).searches)


def _plain(result: Any) -> Any:
    if isinstance(result, list):
        return [_plain(one) for one in result]
    return result.model_dump(mode="json") if hasattr(result, "model_dump") else result


@contextmanager
def serving(store: Any = None) -> Iterator[QdrantServer]:
    """A server on loopback, in a thread of this process. `store`: in place of the client's local mode."""
    qdrant = QdrantServer(store or QdrantClient(":memory:"))
    server = uvicorn.Server(uvicorn.Config(Starlette(routes=qdrant.routes()), "127.0.0.1", 0, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    qdrant.address = f"qdrant://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    yield qdrant
    server.should_exit = True
    thread.join()
