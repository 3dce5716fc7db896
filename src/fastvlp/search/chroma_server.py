"""The client of a Chroma server, of its distributed edition behind such a server, and of Chroma Cloud.

http://HOST:PORT/NAME?tenant=T&database=D. What the address leaves out, the environment says, in the variables of Chroma's own
client: CHROMA_TENANT, CHROMA_DATABASE, and CHROMA_API_KEY, which is in no address.
"""

from __future__ import annotations

import os
from typing import Any, NamedTuple
from urllib.parse import SplitResult, urlsplit

from fastvlp.errors import UserError
from fastvlp.search.addresses import options_of, shown

KEY, TENANT, DATABASE = "CHROMA_API_KEY", "CHROMA_TENANT", "CHROMA_DATABASE"
# Header of the key, as Chroma's own client sends it to the Cloud.
HEADER = "x-chroma-token"
CLOUD = "api.trychroma.com"


class Limits(NamedTuple):
    """`records`: of one request that writes, or that reads by ids; SQLite takes 32,766 variables. `results`: of one that
    searches; more than `records`."""

    records: int = 2000
    results: int = 2**31 - 1


# Both are 300, by docs.trychroma.com/cloud/quotas-limits.
CLOUD_LIMITS = Limits(records=250, results=300)


def collection_name(uri: str) -> str:
    """The collection that an address names."""
    return urlsplit(uri).path.strip("/") or "fastvlp"


def limits(uri: str) -> Limits:
    """Returns the limits of the server at an address."""
    return CLOUD_LIMITS if urlsplit(uri).hostname == CLOUD else Limits()


def remedy(error: Exception) -> str:
    """Returns the advice for an error of the client."""
    said = f"{type(error).__name__} {error}".lower()
    if "not found" in said:
        return "make it first, or name another with ?tenant= and ?database="
    if any(word in said for word in ("auth", "forbidden", "permission")):
        return f"is {KEY} set, and right?"
    return "is a Chroma server running there?"


def connect(uri: str, settings: Any) -> Any:
    """Returns a client. The server is asked at once whether it has the tenant and the database.

    Args:
        uri: Address of the index.
        settings: Of Chroma.

    Raises:
        UserError: The address has an unknown option, or the Cloud's key is missing.
    """
    place, options = urlsplit(uri), options_of(uri, ("tenant", "database"))
    tenant = options.get("tenant") or os.environ.get(TENANT) or None
    database = options.get("database") or os.environ.get(DATABASE) or None
    if place.hostname == CLOUD:
        return _cloud(uri, tenant, database, settings)
    return _server(place, tenant, database, settings)


def _cloud(uri: str, tenant: str | None, database: str | None, settings: Any) -> Any:
    import chromadb

    key = os.environ.get(KEY)
    if not key:
        raise UserError(f"{shown(uri)}: Chroma Cloud asks for a key; set {KEY}")
    # Of a key that is of one tenant and one database, the Cloud knows both.
    return chromadb.CloudClient(tenant=tenant, database=database, api_key=key, settings=settings)


def _server(place: SplitResult, tenant: str | None, database: str | None, settings: Any) -> Any:
    import chromadb
    from chromadb.config import DEFAULT_DATABASE, DEFAULT_TENANT

    tls, key = place.scheme == "https", os.environ.get(KEY)
    headers = {HEADER: key} if key else {}
    if place.password:
        headers["Authorization"] = f"Bearer {place.password}"
    return chromadb.HttpClient(
        place.hostname or "",
        place.port or (443 if tls else 8000),
        ssl=tls,
        headers=headers,
        settings=settings,
        tenant=tenant or DEFAULT_TENANT,
        database=database or DEFAULT_DATABASE,
    )
