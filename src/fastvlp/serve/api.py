"""The service as an ASGI application: the routes behind their guard, and the page at `/`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from logging import getLogger
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.openapi.utils import get_openapi
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.staticfiles import StaticFiles

from fastvlp.errors import UserError
from fastvlp.search.embedder import Embedder
from fastvlp.search.engines.interface import EngineError, IndexEngine
from fastvlp.search.pictures import PictureStore
from fastvlp.serve import messages as m
from fastvlp.serve.guard import Guard, refusal
from fastvlp.serve.limits import Limits, Refusal, refuse
from fastvlp.serve.routes import names, router
from fastvlp.serve.service import Service

PAGE = Path(str(files("fastvlp.serve"))) / "page"
BODIES = (m.EmbeddingsRequest, m.ScoreRequest, m.SearchRequest, m.ItemRequest, m.CaptionRequest, m.AnswerRequest)


def create_app(
    embedder: Embedder,
    index: IndexEngine | None = None,
    *,
    pictures: PictureStore | None = None,
    limits: Limits | None = None,
    keys: Sequence[str] = (),
    origins: Sequence[str] = (),
    report: Path | None = None,
) -> FastAPI:
    """`pictures`: of the index's items. `keys`: where there are any, one must come with every request but for the page
    itself and /docs. `origins`: other sites whose pages may ask (CORS). `report`: an HTML file to show at /report.

    Raises UserError for a key that no header can carry.
    """
    if any(not key or not key.isascii() or not key.isprintable() or key != key.strip() for key in keys):
        raise UserError("`api_key`: a key is of printable ASCII characters, with no space around it")
    limits = limits or Limits()
    service = Service(embedder, index, pictures, limits)

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        yield
        service.close()

    # FastAPI's own pages of documentation load from another host: fastapi_offline has what they load.
    app = FastAPI(title="fastvlp", version=_version(), lifespan=life, docs_url=None, redoc_url=None)
    app.state.service, app.state.report, app.state.keys = service, report, keys
    app.include_router(router)
    app.add_api_route("/", _page("index.html"), include_in_schema=False)
    app.add_api_route("/docs", _page("docs.html"), include_in_schema=False)
    app.mount("/page/swagger", StaticFiles(packages=[("fastapi_offline", "static")]))
    app.mount("/page", StaticFiles(directory=PAGE))
    app.add_middleware(Guard, limits=limits, keys=keys, origins=origins, metrics=service.metrics)
    if origins:
        app.add_middleware(CORSMiddleware, allow_origins=origins, allow_methods=["*"], allow_headers=["*"])
    for kind in (Refusal, HTTPException, RequestValidationError, UserError):
        app.add_exception_handler(kind, _refused)
    app.openapi = lambda: _document(app)  # type: ignore[method-assign]
    return app


def _page(name: str) -> Callable[[], Awaitable[Response]]:
    async def page() -> Response:
        return FileResponse(PAGE / name, headers={"cache-control": "no-cache"})

    return page


def _refused(request: Request, error: Exception) -> Response:
    match error:
        case HTTPException():
            answer = refusal(Refusal(error.status_code, "http_error", f"{request.url.path}: {error.detail}"))
            answer.headers.update(error.headers or {})
            return answer
        case RequestValidationError():
            first = error.errors()[0]
            return refusal(refuse(f"{'.'.join(map(str, first['loc'][1:]))}: {first['msg']}"))
        case Refusal():
            return refusal(error)
        case EngineError():
            # Its words hold paths and addresses of the server.
            getLogger(__name__).error("%s: %s", request.url.path, error, exc_info=error)
            return refusal(Refusal(503, "unavailable", "the index cannot be used now", retry_s=5))
    return refusal(refuse(str(error)))


def _document(app: FastAPI) -> dict[str, Any]:
    if app.openapi_schema is None:
        document = get_openapi(title=app.title, version=app.version, routes=app.routes)
        document.setdefault("components", {}).setdefault("schemas", {}).update(names(BODIES))
        if app.state.keys:
            document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
            document["security"] = [{"key": []}]
        app.openapi_schema = document
    return app.openapi_schema


def _version() -> str:
    try:
        return version("fastvlp")
    except PackageNotFoundError:
        return "0"
