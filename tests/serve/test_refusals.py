"""Requests that a service refuses: malformed or too large ones, without a key, and from pages of other sites."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from fastvlp.errors import UserError
from fastvlp.serve.api import create_app
from fastvlp.serve.limits import Limits
from tests.serve.standins import StandinEmbedder, b64, opened, refused, shade


def bomb() -> bytes:
    """A PNG whose header says 50,000 x 50,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 9999))
        + chunk(b"IEND", b"")
    )


JSON = {"content-type": "application/json"}
BAD = {
    "malformed JSON": ({"content": b'{"input": "a', "headers": JSON}, 400, "JSON"),
    "not UTF-8": ({"content": b'{"input": "\xff"}', "headers": JSON}, 400, ""),
    "half a surrogate": ({"content": b'{"input": "\\ud800"}', "headers": JSON}, 400, ""),
    "deep JSON": ({"content": b"[" * 100_000, "headers": JSON}, 400, ""),
    "an empty body": ({"content": b""}, 400, "JSON"),
    "no field": ({"json": {}}, 400, "input"),
    "an empty list": ({"json": {"input": []}}, 400, "input"),
    "an empty text": ({"json": {"input": ""}}, 400, "input"),
    "a misspelt field": ({"json": {"input": "a", "imput": 1}}, 400, "imput"),
    "a number": ({"json": {"input": 7}}, 400, "input"),
    "tokens": ({"json": {"input": [[1, 2]]}}, 400, "input"),
    "another model": ({"json": {"input": "a", "model": "gpt"}}, 404, "gpt"),
    "other dimensions": ({"json": {"input": "a", "dimensions": 3}}, 400, "16"),
    "bad base64": ({"json": {"input": {"image": "!!!"}}}, 400, "base64"),
    "a URL": ({"json": {"input": {"image": "http://127.0.0.1/a.png"}}}, 400, "URLs are not read"),
    "a path": ({"json": {"input": {"image": "/etc/passwd"}}}, 400, "base64"),
    "a file URL": ({"json": {"input": {"image": "file:///etc/passwd"}}}, 400, "URLs are not read"),
    "not an image": ({"json": {"input": {"image": b64(b"hello there, no image")}}}, 400, "not an image"),
    "half an image": ({"json": {"input": ["a", {"image": b64(shade("red", 0)[:60])}]}}, 400, "image"),
    "a bomb": ({"files": {"image": bomb()}}, 400, "pixels"),
    "too many": ({"json": {"input": ["a"] * 99}}, 400, "99 inputs"),
    "a long text": ({"json": {"input": "a" * 9999}}, 400, "9999 characters"),
    "a huge body": ({"content": b" " * 3_000_000}, 413, "2 MB"),
    "another type": ({"content": b"input=a", "headers": {"content-type": "text/csv"}}, 415, "text/csv"),
    "no boundary": ({"content": b"abc", "headers": {"content-type": "multipart/form-data"}}, 400, "boundary"),
    "a broken form": (
        {"content": b"--x\r\nabc", "headers": {"content-type": "multipart/form-data; boundary=x"}},
        400,
        "",
    ),
    "an odd charset": (
        {"content": b"--x\r\n\r\n", "headers": {"content-type": "multipart/form-data; boundary=x; charset=nonsense"}},
        400,
        "",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_requests_are_refused(case: str, tmp_path: Path):
    body, status, words = BAD[case]
    with opened(tmp_path, limits=Limits(body_mb=2, pixels=10**6)) as client:
        refused(client.post("/v1/embeddings", **body), status, words)


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"text": "a", "limit": 0},
        {"text": "a", "limit": 10**9},
        {"text": "a", "offset": 999, "limit": 24},
        {"text": "a", "offset": -1},
        {"text": "a", "where": {"$or": 1}},
        {"text": "a", "where": {"a": {"$gt": 1}}},
        {"text": "a", "where": {"a": "\0"}},
        {"text": "a", "where": [1]},
        {"id": "a\0"},
        {"id": "../../etc/passwd", "image": "aaaa"},
        {"id": "x" * 999},
        {"text": "a", "rerank": 10**6},
    ],
)
def test_bad_searches_are_refused(client: TestClient, body: dict[str, Any]):
    answer = client.post("/v1/search", json=body)
    assert answer.status_code == 400 and "Value error" not in answer.text


def test_paths_outside_the_page_are_not_found(client: TestClient):
    for path in (
        "/page/../api.py",
        "/page/%2e%2e/api.py",
        "/v1/pictures/..%2f..%2fetc%2fpasswd",
        "/page//etc/passwd",
    ):
        assert client.get(path).status_code == 404, path


def test_keys_are_required(tmp_path: Path):
    with opened(tmp_path, keys=("first-key", "second-key")) as client:
        assert client.get("/openapi.json").json()["security"] == [{"key": []}]
        for path in ("/", "/health", "/docs", "/page/swagger/swagger-ui.css", "/page/app.js"):
            assert client.get(path).status_code == 200, path
        assert client.get("/health").json()["key"] is True
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Basic first-key"}, {"cookie": "a=b"}):
            refused(client.post("/v1/embeddings", json={"input": "a"}, headers=headers), 401, "key")
        for path in ("/metrics", "/report", "/v1/pictures/a", "/v1/items"):
            assert client.get(path).status_code == 401
        for key in ("first-key", "second-key"):
            bearer = {"authorization": f"Bearer {key}"}
            assert client.post("/v1/embeddings", json={"input": "a"}, headers=bearer).status_code == 200
        refused(client.post("/session", headers={"authorization": "Bearer wrong"}), 401, "key")
        cookie = client.post("/session", headers={"authorization": "Bearer second-key"}).headers["set-cookie"]
        assert "httponly" in cookie.lower() and "samesite=strict" in cookie.lower()
        assert client.get("/v1/items").status_code == 200, "the page's cookie is enough"
        assert client.get("/health").json()["key"] is False
    with pytest.raises(UserError, match="api_key"):
        create_app(StandinEmbedder(), keys=("schlüssel",))


def test_pages_of_other_sites_are_refused(tmp_path: Path):
    origin = {"origin": "https://elsewhere.example"}
    with opened(tmp_path) as client:
        refused(client.post("/v1/items", files={"image": shade("red", 0)}, headers=origin), 403, "elsewhere")
        assert "access-control-allow-origin" not in client.get("/health", headers=origin).headers
        assert client.post("/v1/embeddings", json={"input": "a"}, headers={"origin": "http://localhost"}).is_success
    with opened(tmp_path, origins=("https://elsewhere.example",)) as client:
        answer = client.post("/v1/embeddings", json={"input": "a"}, headers=origin)
        assert answer.is_success and answer.headers["access-control-allow-origin"] == origin["origin"]


def test_nothing_loads_from_another_host(client: TestClient):
    page = client.get("/")
    assert "default-src 'self'" in page.headers["content-security-policy"]
    for path in ("/", *(f"/page/{name}" for name in ("app.js", "pictures.js", "meaning.js", "style.css"))):
        assert "//" not in client.get(path).text.replace("// ", "").replace("http://www.w3.org/2000/svg", ""), path
    assert client.get("/docs").status_code == 200
