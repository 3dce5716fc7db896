"""Checks between the network and the routes: keys, sizes and times of requests; and headers of every answer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence

from pydantic_core import to_json
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fastvlp.serve.access import Access
from fastvlp.serve.limits import Limits, Memory, Refusal
from fastvlp.serve.monitoring import Metrics

# Paths that a browser may load without a key: nothing in them is about the data.
OPEN_PATHS = ("/", "/health", "/openapi.json", "/docs", "/session")
POLICY = "default-src 'self'; img-src 'self' blob: data:; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
}
MESSAGE = 500
TYPES = {401: "authentication_error", 403: "permission_error", 503: "overloaded_error"}


def json_response(content: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """Returns content as JSON; floats in full precision."""
    return Response(to_json(content), status, headers, media_type="application/json")


def shortened(message: str) -> str:
    """Returns a message that may quote what a request had, of at most MESSAGE characters."""
    return message if len(message) <= MESSAGE else f"{message[:MESSAGE]}..."


def error_response(error: Refusal) -> Response:
    """Returns an error in OpenAI's shape."""
    kind = TYPES.get(error.status, "invalid_request_error")
    content = {"error": {"message": shortened(error.message), "type": kind, "code": error.code}}
    headers = {"retry-after": str(error.retry_s)} if error.retry_s is not None else {}
    return json_response(
        content, error.status, headers | ({"www-authenticate": "Bearer"} if error.status == 401 else {})
    )


class Guard:
    """ASGI middleware. It reads the body of a request whole, within the limits, before a route sees it, and cancels the route
    when its time is over or the client has left.

    Attributes:
        requests: How many are being read or answered.
        memory: Of the bodies of these requests.
    """

    def __init__(
        self, app: ASGIApp, *, limits: Limits, access: Access, origins: Sequence[str], metrics: Metrics, memory: Memory
    ):
        self.app, self.limits, self.access, self.origins, self.metrics = app, limits, access, origins, metrics
        self.memory = memory
        self.requests = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        began, status = time.perf_counter(), 499  # nginx's status for a client that left
        self.requests += 1

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            await self._answer(scope, receive, sending)
        except Refusal as error:
            if status == 499:
                await error_response(error)(scope, receive, sending)
        finally:
            self.requests -= 1
            # Paths without a route share one label: each typing error would make another.
            route = getattr(scope.get("route"), "path", "other")
            self.metrics.request(route, status, time.perf_counter() - began)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._admit(scope, Headers(scope=scope))
        parts: list[bytes] = []
        try:
            if await self._read(receive, parts):
                await self._route(scope, b"".join(parts), receive, send)
        finally:
            self.memory.add(-sum(map(len, parts)))

    async def _read(self, receive: Receive, parts: list[bytes]) -> bool:
        """Appends the body's parts. Returns False if the client left before its end."""
        length = 0
        try:
            async with asyncio.timeout(self.limits.seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return False
                    parts.append(message.get("body", b""))
                    length += len(parts[-1])
                    self.memory.add(len(parts[-1]))
                    self._check_size(length)
                    if not message.get("more_body", False):
                        return True
        except TimeoutError as error:
            raise Refusal(408, "slow", f"the request did not arrive within {self.limits.seconds:g} s") from error

    def _admit(self, scope: Scope, headers: Headers) -> None:
        limits, path = self.limits, scope["path"]
        if self.requests > limits.requests:
            raise Refusal(503, "busy", f"{limits.requests} requests are being answered already", retry_s=1)
        if "transfer-encoding" in headers:
            # A million chunks of a byte would keep the event loop for seconds, whatever is done with them.
            raise Refusal(411, "no_length", "send the request with a Content-Length, not in chunks")
        length = headers.get("content-length", "0")
        self._check_size(int(length) if length.isdecimal() and len(length) < 20 else 0)
        if not self.access.knows_host(headers):
            name = headers.get("host", "none")
            raise Refusal(
                403,
                "host",
                f"host {name}: use an address of this machine, or start the service with a key, which allows every name",
            )
        origin = headers.get("origin")
        same = origin is None or origin.partition("://")[2] == headers.get("host")
        # Forms of other sites need no permission from CORS to be sent: they are stopped here.
        if not same and not {origin, "*"} & {*self.origins} and scope["method"] not in ("GET", "HEAD", "OPTIONS"):
            raise Refusal(403, "origin", f"pages of {origin} may not use this service")
        if path not in OPEN_PATHS and not path.startswith("/page/") and not self.access.allows(headers):
            raise Refusal(401, "invalid_api_key", "this needs a key: Authorization: Bearer KEY")

    def _check_size(self, length: int) -> None:
        if length > self.limits.body_mb * 1e6:
            raise Refusal(413, "too_large", f"a request may have {self.limits.body_mb:g} MB")
        # Without a body there is nothing to hold.
        if length and self.memory.held > self.memory.limit:
            raise Refusal(503, "busy", "other requests use all the memory", retry_s=2)

    async def _route(self, scope: Scope, body: bytes, receive: Receive, send: Send) -> None:
        unread = [{"type": "http.request", "body": body, "more_body": False}]
        # After the body comes one more message: that the client has left.
        disconnected = asyncio.ensure_future(receive())

        async def replay() -> Message:
            return unread.pop() if unread else await asyncio.shield(disconnected)

        routed = asyncio.ensure_future(self.app(scope, replay, send))
        try:
            done, _ = await asyncio.wait(
                {routed, disconnected}, timeout=self.limits.seconds, return_when=asyncio.FIRST_COMPLETED
            )
            if routed in done:
                routed.result()
            elif not done:
                raise Refusal(503, "timeout", f"no answer within {self.limits.seconds:g} s", retry_s=2)
        finally:
            for task in (routed, disconnected):
                task.cancel()
            await asyncio.gather(routed, disconnected, return_exceptions=True)
