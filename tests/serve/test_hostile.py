"""Requests and connections that would cost a service far more than they cost their sender."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from starlette.datastructures import Headers
from starlette.testclient import TestClient

from fastvlp.errors import UserError
from fastvlp.search.checks import check_where
from fastvlp.serve import bodies
from fastvlp.serve.access import Access
from fastvlp.serve.api import create_app
from fastvlp.serve.limits import Limits, Memory
from fastvlp.serve.service import Service, decoded_bytes
from tests.serve.standins import StandinEmbedder, StandinIndex, listening, opened, picture, refused, shade

JSON = {"content-type": "application/json"}
FIELDS = ",".join(f'"f{i}": 1' for i in range(1000))
HUGE = {
    "numbers": b'{"input": [' + b"1," * 300_000 + b"1]}",
    "a thousand numbers": b'{"input": [' + b"1," * 999 + b"1]}",
    "lists in lists": b'{"input": [' + (b"[" + b"1," * 63 + b"1],") * 63 + b"1]}",
    "empty lists": b'{"input": [' + b"[]," * 300_000 + b"[]]}",
    "a deep list": b'{"input": ' + b"[" * 300_000 + b"]" * 300_000 + b"}",
    "a deep mapping": b'{"input":' * 100_000 + b"1" + b"}" * 100_000,
    "fields": b'{"input": "a", ' + FIELDS.encode() + b"}",
    "a huge number": b'{"input": "a", "dimensions": ' + b"9" * 500_000 + b"}",
    "not a number": b'{"input": "a", "dimensions": NaN}',
    "infinity": b'{"input": "a", "dimensions": -Infinity}',
    "a long name": b'{"input": "a", "' + b"x" * 500_000 + b'": 1}',
    "a byte order mark in UTF-16": '{"input": "a"}'.encode("utf-16"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", HUGE)
def test_huge_bodies_are_refused_before_they_are_validated(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch):
    errors: list[int] = []
    describe = bodies._describe
    monkeypatch.setattr(bodies, "_describe", lambda error: (errors.append(error.error_count()), describe(error))[1])
    with opened(tmp_path) as client:
        answer = client.post("/v1/embeddings", content=HUGE[name], headers=JSON)
        refused(answer, 400, "")
        assert len(answer.content) < 1000 and max(errors, default=0) < 20_000


def test_bodies_are_read_in_threads_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """While one is read, others are answered."""
    began, gate, validated = threading.Event(), threading.Event(), bodies._validated

    def slowly(*arguments: Any) -> Any:
        began.set()
        assert gate.wait(20)
        return validated(*arguments)

    monkeypatch.setattr(bodies, "_validated", slowly)
    with opened(tmp_path) as client:
        answers: list[Any] = []
        forms: list[dict[str, Any]] = [{"json": {"input": "red"}}, {"files": [("input", (None, "red"))]}]
        for form in forms:
            began.clear()
            gate.clear()
            thread = threading.Thread(target=lambda f=form: answers.append(client.post("/v1/embeddings", **f)))
            thread.start()
            assert began.wait(20) and client.get("/health").status_code == 200
            gate.set()
            thread.join()
            assert answers.pop().status_code == 200


def test_filters_of_a_thousand_fields_or_values_are_refused(tmp_path: Path):
    for where in ({f"f{i}": 1 for i in range(1000)}, {"a": [*range(1000)]}, {f"f{i}": 1 for i in range(33)}):
        with opened(tmp_path) as client:
            refused(client.post("/v1/search", json={"text": "a", "where": where}), 400, "")
            refused(client.post("/v1/search", data={"text": "a", "where": json.dumps(where)}, files=NOTHING), 400, "")
        with pytest.raises(UserError, match="at most"):
            check_where(where)


NOTHING: Any = {"limit": (None, "1")}


def test_forms_of_many_fields_are_refused(tmp_path: Path):
    with opened(tmp_path) as client:
        refused(client.post("/v1/embeddings", files=[("input", (None, "a"))] * 3000), 400, "fields")
        refused(client.post("/v1/embeddings", files=[("image", ("x", b"a"))] * 3000), 400, "files")
        nested = {"image": ("x", shade("red", 0)), "info": (None, "[" * 100_000)}
        refused(client.post("/v1/items", files=nested), 400, "JSON")
        for number in ("NaN", "Infinity", "1e999"):
            fields = {"image": ("x", shade("red", 0)), "info": (None, f'{{"a": {number}}}')}
            assert client.post("/v1/items", files=fields).status_code == 400


def test_decoded_pictures_share_the_memory_of_bodies():
    """One that does not fit waits; alone, any is decoded."""
    memory = Memory(1000)
    memory.add(400)
    log: list[str] = []
    begin = threading.Event()

    def second() -> None:
        begin.set()
        with memory.decoding(700):
            log.append("second")

    with memory.decoding(5000):
        thread = threading.Thread(target=second)
        thread.start()
        assert begin.wait(10) and memory.held == 5400
        time.sleep(0.05)
        log.append("first")
    thread.join(10)
    assert log == ["first", "second"] and memory.held == 400


def test_a_pictures_memory_is_known_from_its_header(tmp_path: Path):
    assert decoded_bytes(picture((1, 2, 3), 100)) == 160_000
    assert decoded_bytes(picture((1, 2, 3), 100, "JPEG")) == 80_000
    assert decoded_bytes(b"no picture") == 0
    service = Service(StandinEmbedder(), None, None, Limits())
    held: list[float] = []
    pixels = service.embedder.pixels
    service.embedder.pixels = lambda data: (held.append(service.memory.held), pixels(data))[1]
    asyncio.run(service.pixels([picture((1, 2, 3), 100)]))
    service.close()
    assert held == [160_000] and service.memory.held == 0


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("LOCALHOST:8000", 200),
        ("127.0.0.1:8000", 200),
        ("192.168.1.7", 200),
        ("[::1]:8000", 200),
        ("[fe80::1%eth0]:80", 200),
        ("box.lan:8000", 200),
        ("evil.example", 403),
        ("evil.example:8000", 403),
        ("localhost.evil.example", 403),
        ("127.0.0.1.evil.example", 403),
        ("127.0.0.1@evil.example", 403),
        ("2130706433", 403),
        ("", 403),
    ],
)
def test_without_a_key_other_names_are_refused(tmp_path: Path, host: str, status: int):
    """A page whose name is made to mean 127.0.0.1 asks under its own name (DNS rebinding)."""
    with opened(tmp_path, hosts=("box.lan",)) as client:
        for path in ("/health", "/", "/v1/items", "/metrics"):
            assert client.get(path, headers={"host": host}).status_code == status
        same = {"host": host, "origin": f"http://{host}"}
        assert client.post("/v1/embeddings", json={"input": "a"}, headers=same).status_code == status
    with opened(tmp_path, keys=("sesame",)) as client:
        headers = {"host": host, "authorization": "Bearer sesame"}
        assert client.get("/v1/items", headers=headers).status_code == 200


def test_the_cookie_of_a_session_is_not_the_key(tmp_path: Path):
    bearer = {"authorization": "Bearer sesame"}
    with opened(tmp_path, keys=("sesame",)) as client:
        cookies = [client.post("/session", headers=bearer).headers["set-cookie"] for _ in range(2)]
        assert cookies[0] != cookies[1] and not any("sesame" in cookie for cookie in cookies)
        assert client.get("/v1/items").status_code == 200
        token = client.cookies["fastvlp_session"]
        client.cookies.clear()
        assert client.get("/v1/items", headers={"authorization": f"Bearer {token}"}).status_code == 401
        for wrong in ("sesame", token[:-1], token + "x", ""):
            assert client.get("/v1/items", headers={"cookie": f"fastvlp_session={wrong}"}).status_code == 401
    with opened(tmp_path, keys=("sesame",)) as client:  # another process
        assert client.get("/v1/items", headers={"cookie": f"fastvlp_session={token}"}).status_code == 401


def test_sessions_end_and_are_so_many(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("fastvlp.serve.access.SESSIONS", 3)
    access = Access(("sesame",))
    tokens = [access.open_session() for _ in range(4)]
    valid = [access.allows(Headers({"cookie": f"fastvlp_session={token}"})) for token in tokens]
    assert valid == [False, True, True, True]
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 8 * 24 * 3600)
    assert not access.allows(Headers({"cookie": f"fastvlp_session={tokens[-1]}"}))


def ended(connection: socket.socket) -> bool:
    """Waits until the other side ends the connection."""
    connection.settimeout(10)
    try:
        return connection.recv(1000) == b""
    except ConnectionResetError:
        return True


def test_idle_connections_and_slow_heads_are_ended():
    app = create_app(StandinEmbedder(), StandinIndex(), limits=Limits(idle_s=0.5))
    with listening(app) as address:
        place = ("127.0.0.1", int(address.rpartition(":")[2]))
        with socket.create_connection(place) as idle, socket.create_connection(place) as slow:
            slow.sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\nx: ")
            stop = time.monotonic() + 10
            while time.monotonic() < stop:
                try:
                    slow.sendall(b"x")  # is always about to say more
                except OSError:
                    break
                time.sleep(0.05)
            else:
                pytest.fail("the slow head is still read")
            assert ended(idle)


def test_one_connection_too_many_ends_the_one_that_was_idle_for_longest():
    app = create_app(StandinEmbedder(), StandinIndex(), limits=Limits(connections=3))
    with listening(app) as address:
        place = ("127.0.0.1", int(address.rpartition(":")[2]))
        several = [socket.create_connection(place) for _ in range(3)]
        with socket.create_connection(place) as last:
            last.sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n")
            assert last.recv(100).startswith(b"HTTP/1.1 200") and ended(several[0])
            several[1].sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n")
            assert several[1].recv(100).startswith(b"HTTP/1.1 200")
        for one in several:
            one.close()


def test_bodies_in_chunks_are_refused_before_they_are_read():
    app = create_app(StandinEmbedder(), StandinIndex())
    with listening(app) as address, socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2]))) as one:
        one.settimeout(10)
        head = b"POST /v1/embeddings HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n"
        one.sendall(head + b"1\r\na\r\n" * 100)
        assert one.recv(1000).startswith(b"HTTP/1.1 411")


@pytest.mark.parametrize("head", [b"x: " + b"a" * 3_000_000, b"".join(b"x%d: a\r\n" % i for i in range(200_000))])
def test_huge_heads_are_refused(head: bytes):
    app = create_app(StandinEmbedder(), StandinIndex())
    with listening(app) as address, socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2]))) as one:
        one.settimeout(10)
        try:
            one.sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\n" + head + b"\r\n\r\n")
            answer = one.recv(1000)
        except OSError:
            answer = b""
        assert answer == b"" or answer.startswith(b"HTTP/1.1 4")
        assert TestClient(app, "http://localhost").get("/health").status_code == 200
