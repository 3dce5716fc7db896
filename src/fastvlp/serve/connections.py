"""The HTTP server, uvicorn's, with limits for connections that wait: their number, and how long a head may take to arrive."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from fastvlp.serve.limits import Limits

# Bytes that the head of a request may have.
HEAD = 32 * 1024


class Connection(H11Protocol):
    """A connection.

    Attributes:
        since: When it was opened, or had its last answer.
    """

    limits: Limits

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self.since = time.monotonic()
        super().connection_made(transport)
        if len(self.connections) > self.limits.connections:
            idle = [one for one in self.connections if isinstance(one, Connection) and one.is_idle()]
            min(idle, key=lambda one: one.since, default=self).transport.abort()

    def on_response_complete(self) -> None:
        self.since = time.monotonic()
        super().on_response_complete()

    def is_idle(self) -> bool:
        """Whether no request is being read or answered."""
        return self.cycle is None or self.cycle.response_complete

    def end_if_late(self, now: float) -> None:
        """Ends a connection that is idle for too long, and one whose client does not read its answer."""
        # A request may take to arrive, and again to be answered; then its answer has to be read.
        allowed_s = self.limits.idle_s if self.is_idle() else 3 * self.limits.seconds
        if now - self.since > allowed_s:
            self.transport.abort()


def make_server(app: Any, limits: Limits, **options: Any) -> uvicorn.Server:
    """Builds the server of an ASGI application. `options`: of `uvicorn.Config`."""

    class Limited(Connection):
        pass

    Limited.limits = limits

    async def sweep() -> None:
        now = time.monotonic()
        for connection in [*server.server_state.connections]:
            if isinstance(connection, Connection):
                connection.end_if_late(now)

    config = uvicorn.Config(
        app,
        http=Limited,
        h11_max_incomplete_event_size=HEAD,
        timeout_keep_alive=int(limits.idle_s) or 1,
        callback_notify=sweep,
        timeout_notify=1,
        timeout_graceful_shutdown=10,
        log_level="warning",
        access_log=False,
        server_header=False,
        ws="none",
        **options,
    )
    server = uvicorn.Server(config)
    return server
