"""The command that serves an export: from its options to a listening socket."""

from __future__ import annotations

import socket
from pathlib import Path

import torch
import uvicorn

from fastvlp.errors import UserError
from fastvlp.search.embedder import Embedder
from fastvlp.search.index import open_index, pictures_of
from fastvlp.serve.api import create_app
from fastvlp.serve.options import Serve


def serve(told: Serve) -> None:
    """Answers until it is stopped. Raises UserError for an export, an index or an address that cannot be used."""
    if told.threads:
        torch.set_num_threads(told.threads)
    # First: a port in use is known at once, a model takes a while to load.
    with listen(told.host, told.port) as listening:
        embedder = Embedder.load(told.export, told.device, told.precision)
        index = None if told.index is None else open_index(told.index, embedder.stamp, told.create)
        report = told.report or Path(told.export) / "report.html"
        app = create_app(
            embedder,
            index,
            pictures=None if told.index is None else pictures_of(told.index, told.pictures),
            limits=told.limits,
            keys=told.api_key,
            origins=told.allow_origin,
            report=report if report.is_file() else None,
        )
        host, port = listening.getsockname()[:2]
        items = "no index" if index is None else f"{index.count():,} items"
        print(
            f"http://{f'[{host}]' if ':' in host else host}:{port}/  {embedder.card.get('name')}, {items}; Ctrl-C stops"
        )
        if not told.api_key and not host.startswith(("127.", "::1")):
            print("anyone who reaches this address can ask, add and delete: give an --api-key")
        config = uvicorn.Config(
            app, log_level="warning", access_log=False, timeout_graceful_shutdown=10, server_header=False
        )
        uvicorn.Server(config).run(sockets=[listening])


def listen(host: str, port: int) -> socket.socket:
    """Raises UserError where the address is in use or not this machine's."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        raise UserError(f"{host}:{port}: cannot listen ({error}); choose another --port or --host") from error
