"""Checks between the network and the routes: keys, sizes and times of requests; and headers of every answer."""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import Mapping, Sequence
from http.cookies import CookieError, SimpleCookie
from urllib.parse import unquote

from pydantic_core import to_json
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fastvlp.serve.limits import Limits, Refusal
from fastvlp.serve.monitoring import Metrics

COOKIE = "fastvlp_key"
# Paths that a browser may load without a key: nothing in them is about the data.
OPEN_PATHS = ("/", "/health", "/openapi.json", "/docs", "/session")
POLICY = "default-src 'self'; img-src 'self' blob: data:; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
}
TYPES = {401: "authentication_error", 403: "permission_error", 503: "overloaded_error"}


def json_response(content: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """Returns content as JSON; floats in full precision."""
    return Response(to_json(content), status, headers, media_type="application/json")


def error_response(error: Refusal) -> Response:
    """Returns an error in OpenAI's shape."""
    kind = TYPES.get(error.status, "invalid_request_error")
    content = {"error": {"message": error.message, "type": kind, "code": error.code}}
    headers = {"retry-after": str(error.retry_s)} if error.retry_s is not None else {}
    return json_response(
        content, error.status, headers | ({"www-authenticate": "Bearer"} if error.status == 401 else {})
    )


def given_key(headers: Headers) -> str:
    """Returns the bearer token, or else the content of the page's cookie; an empty text where there is neither."""
    scheme, _, token = headers.get("authorization", "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else _cookie(headers)


def has_key(headers: Headers, keys: Sequence[str]) -> bool:
    """Whether a request has one of the keys. The comparison takes as long for a key that is nearly right."""
    given = given_key(headers)
    return sum(hmac.compare_digest(given.encode(), key.encode()) for key in keys) > 0


def _cookie(headers: Headers) -> str:
    try:
        cookie = SimpleCookie(headers.get("cookie", "")).get(COOKIE)
    except CookieError:
        return ""
    return unquote(cookie.value) if cookie else ""


class Guard:
    """ASGI middleware. It reads the body of a request whole, within the limits, before a route sees it, and cancels the route
    when its time is over or the client has left.

    Attributes:
        requests: How many are being read or answered.
        held_bytes: Of the bodies of these requests.
    """

    def __init__(self, app: ASGIApp, *, limits: Limits, keys: Sequence[str], origins: Sequence[str], metrics: Metrics):
        self.app, self.limits, self.keys, self.origins, self.metrics = app, limits, keys, origins, metrics
        self.requests = 0
        self.held_bytes = 0

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
            self.held_bytes -= sum(map(len, parts))

    async def _read(self, receive: Receive, parts: list[bytes]) -> bool:
        """Appends the body's parts. Returns False where the client left before its end."""
        length = 0
        try:
            async with asyncio.timeout(self.limits.seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return False
                    parts.append(message.get("body", b""))
                    length += len(parts[-1])
                    self.held_bytes += len(parts[-1])
                    self._check_size(length)
                    if not message.get("more_body", False):
                        return True
        except TimeoutError as error:
            raise Refusal(408, "slow", f"the request did not arrive within {self.limits.seconds:g} s") from error

    def _admit(self, scope: Scope, headers: Headers) -> None:
        limits, path = self.limits, scope["path"]
        if self.requests > limits.requests:
            raise Refusal(503, "busy", f"{limits.requests} requests are being answered already", retry_s=1)
        length = headers.get("content-length", "0")
        self._check_size(int(length) if length.isdecimal() and len(length) < 20 else 0)
        origin = headers.get("origin")
        same = origin is None or origin.partition("://")[2] == headers.get("host")
        # Forms of other sites need no permission from CORS to be sent: they are stopped here.
        if not same and not {origin, "*"} & {*self.origins} and scope["method"] not in ("GET", "HEAD", "OPTIONS"):
            raise Refusal(403, "origin", f"pages of {origin} may not use this service")
        if self.keys and path not in OPEN_PATHS and not path.startswith("/page/") and not has_key(headers, self.keys):
            raise Refusal(401, "invalid_api_key", "this needs a key: Authorization: Bearer KEY")

    def _check_size(self, length: int) -> None:
        if length > self.limits.body_mb * 1e6:
            raise Refusal(413, "too_large", f"a request may have {self.limits.body_mb:g} MB")
        if self.held_bytes > self.limits.held_mb * 1e6:
            raise Refusal(503, "busy", "the requests of others fill the memory", retry_s=2)

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
