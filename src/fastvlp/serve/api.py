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
from fastvlp.search.checks import EngineError
from fastvlp.search.embedder import Embedder
from fastvlp.search.engines.interface import IndexEngine
from fastvlp.search.pictures import PictureStore
from fastvlp.serve import messages
from fastvlp.serve.access import Access
from fastvlp.serve.guard import Guard, error_response
from fastvlp.serve.limits import Limits, Refusal, bad_request
from fastvlp.serve.routes import body_schemas, router
from fastvlp.serve.service import Service

PAGE = Path(str(files("fastvlp.serve"))) / "page"
BODIES = (
    messages.EmbeddingsRequest,
    messages.ScoreRequest,
    messages.SearchRequest,
    messages.ItemRequest,
    messages.CaptionRequest,
    messages.AnswerRequest,
)


def create_app(
    embedder: Embedder,
    index: IndexEngine | None = None,
    *,
    pictures: PictureStore | None = None,
    limits: Limits | None = None,
    keys: Sequence[str] = (),
    hosts: Sequence[str] = (),
    origins: Sequence[str] = (),
    report: Path | None = None,
) -> FastAPI:
    """Builds the ASGI application.

    Args:
        embedder: The model.
        index: To search in; None if there is none.
        pictures: Of the index's items.
        limits: Of requests.
        keys: Where there are any, every request needs one, but for the page itself and /docs.
        hosts: Names of this machine under which requests may come without a key, beside localhost and its addresses.
        origins: Other sites whose pages may use the service (CORS).
        report: An HTML file to show at /report.

    Raises:
        UserError: A key cannot be sent in a header.
    """
    access = Access(keys, hosts)
    limits = limits or Limits()
    service = Service(embedder, index, pictures, limits)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        service.close()

    # FastAPI's own pages of documentation load files from another host: fastapi_offline brings them.
    app = FastAPI(title="fastvlp", version=_version(), lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.service, app.state.report, app.state.access = service, report, access
    app.include_router(router)
    app.add_api_route("/", _static_page("index.html"), include_in_schema=False)
    app.add_api_route("/docs", _static_page("docs.html"), include_in_schema=False)
    app.mount("/page/swagger", StaticFiles(packages=[("fastapi_offline", "static")]))
    app.mount("/page", StaticFiles(directory=PAGE))
    app.add_middleware(
        Guard, limits=limits, access=access, origins=origins, metrics=service.metrics, memory=service.memory
    )
    if origins:
        app.add_middleware(CORSMiddleware, allow_origins=origins, allow_methods=["*"], allow_headers=["*"])
    for kind in (Refusal, HTTPException, RequestValidationError, UserError):
        app.add_exception_handler(kind, _handle_error)
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]
    return app


def _static_page(name: str) -> Callable[[], Awaitable[Response]]:
    async def page() -> Response:
        return FileResponse(PAGE / name, headers={"cache-control": "no-cache"})

    return page


def _handle_error(request: Request, error: Exception) -> Response:
    match error:
        case HTTPException():
            response = error_response(Refusal(error.status_code, "http_error", f"{request.url.path}: {error.detail}"))
            response.headers.update(error.headers or {})
            return response
        case RequestValidationError():
            first = error.errors()[0]
            return error_response(bad_request(f"{'.'.join(map(str, first['loc'][1:]))}: {first['msg']}"))
        case Refusal():
            return error_response(error)
        case EngineError():
            # Its message names paths and addresses of the server.
            getLogger(__name__).error("%s: %s", request.url.path, error, exc_info=error)
            return error_response(Refusal(503, "unavailable", "the index cannot be used now", retry_s=5))
    return error_response(bad_request(str(error)))


def _openapi(app: FastAPI) -> dict[str, Any]:
    if app.openapi_schema is None:
        document = get_openapi(title=app.title, version=app.version, routes=app.routes)
        document.setdefault("components", {}).setdefault("schemas", {}).update(body_schemas(BODIES))
        if app.state.access.keys:
            document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
            document["security"] = [{"key": []}]
        app.openapi_schema = document
    return app.openapi_schema


def _version() -> str:
    try:
        return version("fastvlp")
    except PackageNotFoundError:
        return "0"
