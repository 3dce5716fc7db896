"""Requests made from the service's own OpenAPI document, half right and half wrong: never a 5xx, always a message.
And clients that are slow or leave."""

from __future__ import annotations

import base64
import socket
import time
from json import dumps
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from fastvlp.serve.api import create_app
from fastvlp.serve.limits import Limits
from fastvlp.serve.pictures import Pictures
from tests.serve.standins import StandinEmbedder, StandinIndex, listening, shade

PICTURE = base64.b64encode(shade("red", 0)).decode()
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
JUNK = st.recursive(
    SCALARS,
    lambda part: st.lists(part, max_size=3) | st.dictionaries(st.text(max_size=8), part, max_size=3),
    max_leaves=6,
)


def values(schema: dict[str, Any], named: dict[str, Any]) -> st.SearchStrategy[Any]:
    """What a JSON schema allows."""
    if "$ref" in schema:
        return st.deferred(lambda: values(named[schema["$ref"].rpartition("/")[2]], named))
    if "anyOf" in schema:
        return st.one_of([values(part, named) for part in schema["anyOf"]])
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    match schema.get("type"):
        case "object" if "properties" in schema:
            parts = {name: values(part, named) for name, part in schema["properties"].items()}
            required = {name: parts.pop(name) for name in schema.get("required", ())}
            return st.fixed_dictionaries(required, optional=parts)
        case "object":
            return st.dictionaries(st.from_regex("[a-z]{1,5}", fullmatch=True), SCALARS, max_size=3)
        case "array":
            return st.lists(values(schema.get("items", {}), named), min_size=schema.get("minItems", 0), max_size=3)
        case "integer":
            return st.integers(schema.get("minimum", -(2**60)), schema.get("maximum", 2**60))
        case "number":
            return st.floats()
        case "boolean":
            return st.booleans()
        case "null":
            return st.none()
        case "string" if schema.get("contentEncoding") == "base64" or schema.get("format") == "binary":
            return st.just(PICTURE) | st.binary(max_size=60).map(lambda data: base64.b64encode(data).decode())
        case "string":
            return st.text(min_size=schema.get("minLength", 0), max_size=30) | st.sampled_from(["red", "red/0"])
    return JUNK


def broken(value: Any) -> st.SearchStrategy[Any]:
    """The value with one of its parts replaced by junk, or one more part."""
    if isinstance(value, dict) and value:
        replaced = st.tuples(st.sampled_from([*value]), JUNK).map(lambda change: value | {change[0]: change[1]})
        return replaced | st.tuples(st.text(max_size=5), JUNK).map(lambda extra: value | {extra[0]: extra[1]}) | JUNK
    return JUNK


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder: Path = tmp_path_factory.mktemp("fuzz")
    app = create_app(StandinEmbedder(), StandinIndex(), pictures=Pictures(folder), limits=Limits(window_ms=0))
    # A 500 is raised here as the exception that it hides.
    with TestClient(app) as client:
        client.post("/v1/items", data={"id": "red/0"}, files={"image": shade("red", 0)})
        yield client


def bodies(client: TestClient) -> tuple[list[tuple[str, dict[str, Any], dict[str, Any]]], dict[str, Any]]:
    """Paths with the schemas of their JSON and their form, and the named schemas."""
    document = client.get("/openapi.json").json()
    found = []
    for path, methods in document["paths"].items():
        content = methods.get("post", {}).get("requestBody", {}).get("content")
        if content:
            found.append((path, content["application/json"]["schema"], content["multipart/form-data"]["schema"]))
    return found, document["components"]["schemas"]


@given(st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_no_request_is_answered_with_5xx(client: TestClient, data: st.DataObject):
    routes, named = bodies(client)
    path, json, form = data.draw(st.sampled_from(routes))
    kind = data.draw(st.sampled_from(["right", "broken", "form", "bytes"]))
    match kind:
        case "right" | "broken":
            body = data.draw(values(json, named))
            said = dumps(body if kind == "right" else data.draw(broken(body)))  # Infinity and NaN included
            answer = client.post(path, content=said, headers={"content-type": "application/json"})
        case "form":
            fields = data.draw(values(form, named))
            parts: list[tuple[str, Any]] = []
            for name, value in fields.items():
                for one in value if isinstance(value, list) else [value]:
                    sent = base64.b64decode(one) if name == "image" else str(one).encode("utf-8", "replace")
                    parts.append((name, ("x", sent) if name == "image" else (None, sent)))
            answer = client.post(path, files=parts or [("nothing", (None, b""))])
        case _:
            media = data.draw(
                st.sampled_from(["application/json", "multipart/form-data; boundary=x", "text/plain", ""])
            )
            body = data.draw(st.binary(max_size=80).map(lambda tail: b"--x\r\n" + tail) | st.binary(max_size=80))
            answer = client.post(path, content=body, headers={"content-type": media})
    assert answer.status_code < 500
    if answer.status_code >= 400:
        assert answer.json()["error"]["message"]


@given(st.text(max_size=40), st.sampled_from(["GET", "DELETE", "POST", "PUT", "PATCH"]))
@settings(max_examples=60, deadline=None)
def test_no_path_is_answered_with_5xx(client: TestClient, id: str, method: str):
    for path in (f"/v1/items/{quote(id, safe='', errors='replace')}", f"/page/{quote(id, errors='replace')}"):
        assert client.request(method, path).status_code < 500
        assert client.request(method, path + "/image").status_code < 500
    assert client.get("/v1/items", params={"limit": id, "seed": id}).status_code < 500


def test_slow_senders_are_cut_off_and_who_leaves_is_forgotten(tmp_path: Path):
    embedder = StandinEmbedder()
    app = create_app(embedder, StandinIndex(), limits=Limits(seconds=1.5, window_ms=0))
    service = app.state.service
    head = b"POST /v1/embeddings HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\ncontent-length: 14\r\n\r\n"
    with listening(app) as address:
        place = ("127.0.0.1", int(address.rpartition(":")[2]))
        with socket.create_connection(place) as slow:
            slow.sendall(head + b'{"in')
            assert slow.recv(100).startswith(b"HTTP/1.1 408")
        embedder.gate.clear()
        # The model is at the first; the second waits and leaves.
        with socket.create_connection(place) as first:
            first.sendall(head + b'{"input": "a"}')
            assert embedder.running.wait(10)
            with socket.create_connection(place) as second:
                second.sendall(head + b'{"input": "b"}')
                until(lambda: service.batcher.waiting == 1)
            until(lambda: service.batcher.waiting == 0)
        embedder.gate.set()
        with socket.create_connection(place) as last:
            last.sendall(head + b'{"input": "c"}')
            assert last.recv(100).startswith(b"HTTP/1.1 200")
    assert embedder.batches == [1, 1], "nobody waited for b any more"


def until(true: Any, seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)
