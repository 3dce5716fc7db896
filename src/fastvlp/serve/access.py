"""Access to the service: by a key, by a session that a key opened, and by names of this machine."""

from __future__ import annotations

import hmac
import ipaddress
import secrets
import time
from collections.abc import Sequence
from http.cookies import CookieError, SimpleCookie

from starlette.datastructures import Headers

from fastvlp.errors import UserError

COOKIE = "fastvlp_session"
# Sessions that are kept, and how long each.
SESSIONS, SESSION_S = 1000, 7 * 24 * 3600


class Access:
    """Keys, and the sessions of browsers. A session's cookie says nothing of the key; all end with the process.

    Args:
        keys: A request needs one of them, where there are any.
        hosts: Names under which requests may come where there are no keys, beside localhost and literal addresses. The page
            of another site whose name is made to mean this machine's address (DNS rebinding) comes under that site's name.
    """

    def __init__(self, keys: Sequence[str] = (), hosts: Sequence[str] = ()):
        if any(not key or not key.isascii() or not key.isprintable() or key != key.strip() for key in keys):
            raise UserError("`api_key`: a key must consist of printable ASCII characters, without spaces around it")
        self.keys = tuple(keys)
        self.hosts = {host.lower().rstrip(".") for host in ("localhost", *hosts)}
        self._sessions: dict[str, float] = {}

    def allows(self, headers: Headers) -> bool:
        """Whether a request has a key or a session, or needs none."""
        return not self.keys or self._has_key(headers) or self._in_session(headers)

    def _has_key(self, headers: Headers) -> bool:
        scheme, _, token = headers.get("authorization", "").partition(" ")
        given = token.strip() if scheme.lower() == "bearer" else ""
        # Takes as long for a key that is nearly right.
        return sum(hmac.compare_digest(given.encode(), key.encode()) for key in self.keys) > 0

    def _in_session(self, headers: Headers) -> bool:
        try:
            cookie = SimpleCookie(headers.get("cookie", "")).get(COOKIE)
        except CookieError:
            return False
        return cookie is not None and self._sessions.get(cookie.value, 0) > time.monotonic()

    def open_session(self) -> str:
        """Returns the cookie of a new session. The oldest one ends where there are too many."""
        while len(self._sessions) >= SESSIONS:
            del self._sessions[next(iter(self._sessions))]
        token = secrets.token_urlsafe(32)
        self._sessions[token] = time.monotonic() + SESSION_S
        return token

    def knows_host(self, headers: Headers) -> bool:
        """Whether a request came under a name that is this service's."""
        return bool(self.keys) or self._is_own(host_name(headers.get("host", "")))

    def _is_own(self, name: str) -> bool:
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return name in self.hosts
        return True


def host_name(host: str) -> str:
    """Returns the name or address of a Host header, without the port and the brackets of IPv6."""
    if host.startswith("["):
        return host[1:].partition("]")[0].partition("%")[0]
    return host.partition(":")[0].lower().rstrip(".")
