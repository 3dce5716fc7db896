"""Serving an export: from options to a listening socket."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from fastvlp.dist import PrecisionChoice
from fastvlp.errors import UserError, install
from fastvlp.search.embedder import Embedder
from fastvlp.search.engines.interface import IndexEngine, open_index, pictures_of
from fastvlp.search.indexing import IndexAddress
from fastvlp.search.pictures import PictureStore
from fastvlp.serve.limits import Limits

KEY_VARIABLE = "FASTVLP_API_KEY"


def serve(
    export: Annotated[str | Path, arg(metavar="EXPORT")],
    /,
    *,
    index: IndexAddress | None = None,
    create: bool = False,
    pictures: str | Path | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key: Sequence[str] = (),
    allow_origin: Sequence[str] = (),
    report: str | Path | None = None,
    limits: Limits = Limits(),  # noqa: B008 (frozen)
    device: str = "auto",
    precision: PrecisionChoice = "auto",
    threads: int | None = None,
) -> None:
    """Serve a model over HTTP until Ctrl-C.

    The service returns embeddings and scores, searches an index, writes captions and answers questions about pictures, as far
    as the model can. It has a search page at /, documentation of the API at /docs, and metrics for Prometheus at /metrics.

    Args:
        export: Folder that `vlp export` wrote; or the folder of a public model with two towers, or its name on the Hugging Face
            hub, such as openai/clip-vit-base-patch32.
        index: Address of the index, as for `vlp index build`. Without it the service cannot search.
        create: Make an empty index if there is none.
        pictures: Folder of the items' pictures; by default the folder that `vlp index build` writes.
        host: Name or address at which the service listens; 0.0.0.0 accepts requests from other machines. Without a key, a
            request must name this host, localhost, or an address.
        port: Port at which the service listens; 0 takes a free port.
        api_key: Keys. A request needs one of them as a bearer token. Other users of this machine can see a command line, so
            better set the environment variable FASTVLP_API_KEY.
        allow_origin: Other sites whose pages may send requests, such as https://example.org; * for all sites.
        report: HTML file of the run's report, shown at /report; by default report.html in the export, if there is one.
        limits: Limits of requests and of the service.
        device: auto, cpu, cuda or cuda:N.
        precision: Precision of the computation: fp32, bf16, or auto, which is bf16 if the model was trained in bf16 and the
            device computes bf16 fast.
        threads: CPU threads that PyTorch uses; by default one for each core.

    Raises:
        UserError: The export, the index or the address cannot be used, or a package that the service needs is missing.
    """
    require_extra()
    keys = [*api_key, *([key] if (key := os.environ.get(KEY_VARIABLE)) else [])]
    # The port is opened before the model is loaded, which takes a while, so that a port in use is reported at once.
    with listen(host, port) as listening:
        embedder = Embedder.load(export, device, precision, threads)
        engine = None if index is None else open_index(index, embedder.stamp, create)
        store = None if index is None else pictures_of(index, pictures)
        report = Path(report or Path(export) / "report.html")
        run(
            embedder, engine, store, listening, limits, keys, [host], allow_origin, report if report.is_file() else None
        )


def require_extra() -> None:
    """Raises UserError if a package that the service needs is missing."""
    try:
        import uvicorn  # noqa: F401

        import fastvlp.serve.api  # noqa: F401
    except ImportError as error:
        raise UserError(f"no {error.name}: the service needs the extra serve: {install('serve')}") from error


def run(
    embedder: Embedder,
    index: IndexEngine | None,
    pictures: PictureStore | None,
    listening: socket.socket,
    limits: Limits,
    keys: Sequence[str],
    hosts: Sequence[str],
    origins: Sequence[str],
    report: Path | None,
) -> None:
    """Answers until it is stopped. Its address is the first line that it prints."""
    from fastvlp.serve.api import create_app
    from fastvlp.serve.connections import make_server

    app = create_app(
        embedder, index, pictures=pictures, limits=limits, keys=keys, hosts=hosts, origins=origins, report=report
    )
    host, port = listening.getsockname()[:2]
    items = "no index" if index is None else f"{index.count():,} items"
    name = f"[{host}]" if ":" in host else host
    print(f"http://{name}:{port}/  {embedder.card.get('name')}, {items}; Ctrl-C stops", flush=True)
    if not keys and not host.startswith(("127.", "::1")):
        print(f"anyone who reaches this address can ask, add and delete: ask for a key, by {KEY_VARIABLE} for one")
    make_server(app, limits).run(sockets=[listening])


def listen(host: str, port: int) -> socket.socket:
    """Opens a socket. Raises UserError if the address is in use or not this machine's."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        raise UserError(f"{host}:{port}: cannot listen ({error}); choose another `port` or `host`") from error
