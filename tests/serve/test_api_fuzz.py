"""Generated requests, from the OpenAPI document and of random bytes, never give a 5xx; and clients that are slow or leave."""

from __future__ import annotations

import base64
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest
import schemathesis
from fastapi import FastAPI
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import negative_data_rejection, positive_data_acceptance
from schemathesis.transport.serialization import Binary
from starlette.testclient import TestClient

from fastvlp.search.pictures import PictureFolder
from fastvlp.serve.api import create_app
from fastvlp.serve.limits import Limits
from tests.serve.standins import StandinEmbedder, StandinIndex, listening, shade

PICTURE = base64.b64encode(shade("red", 0)).decode()
JUNK = st.binary(max_size=60)
schemathesis.openapi.format("byte", st.just(PICTURE) | JUNK.map(lambda data: base64.b64encode(data).decode()))
schemathesis.openapi.format("binary", (st.just(shade("red", 0)) | JUNK).map(Binary))


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> FastAPI:
    pictures = PictureFolder(tmp_path_factory.mktemp("fuzz"))
    return create_app(StandinEmbedder(), StandinIndex(), pictures=pictures, limits=Limits(window_ms=0))


@pytest.fixture(scope="module")
def address(app: FastAPI) -> Iterator[str]:
    with listening(app) as address:
        httpx.post(f"{address}/v1/items", data={"id": "red/0"}, files={"image": shade("red", 0)})
        yield address


@pytest.fixture
def client(app: FastAPI, address: str) -> TestClient:
    """Beside the socket: a 500 is raised here as the exception that it hides."""
    return TestClient(app, "http://localhost")


@pytest.fixture(scope="module")
def document(address: str) -> Any:
    return schemathesis.openapi.from_url(f"{address}/openapi.json")


@pytest.mark.slow
@given(st.data())
@settings(max_examples=100, deadline=None, suppress_health_check=[*HealthCheck])
def test_answers_follow_the_openapi_document(document: Any, data: st.DataObject):
    """Requests that it allows and requests that it forbids: never a 5xx, a status and a body that it names."""
    operations = [operation.ok() for operation in document.get_all_operations()]
    operation = data.draw(st.sampled_from(operations))
    mode = data.draw(st.sampled_from([*GenerationMode]))
    case = data.draw(operation.as_strategy(generation_mode=mode))
    # Whether a picture can be read, or two fields go together, the schema does not say; and of a form all parts are strings.
    form = [negative_data_rejection] if case.media_type == "multipart/form-data" else []
    case.call_and_validate(excluded_checks=[positive_data_acceptance, *form])


@given(
    st.sampled_from(["/v1/embeddings", "/v1/score", "/v1/search", "/v1/items", "/v1/caption", "/v1/answer"]),
    st.sampled_from(["application/json", "multipart/form-data; boundary=x", "multipart/form-data", "text/plain", ""]),
    st.binary(max_size=80).map(lambda tail: b"--x\r\n" + tail) | st.binary(max_size=80),
)
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_bytes_that_are_neither_json_nor_a_form_are_refused(client: TestClient, path: str, media: str, body: bytes):
    answer = client.post(path, content=body, headers={"content-type": media})
    assert 400 <= answer.status_code < 500 and answer.json()["error"]["message"]


@pytest.mark.slow
@given(st.text(max_size=40), st.sampled_from(["GET", "DELETE", "POST", "PUT", "PATCH"]))
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_path_is_answered_with_5xx(client: TestClient, id: str, method: str):
    for place in ("/v1/items", "/v1/pictures", "/page"):
        for path in (quote(id, safe="", errors="replace"), quote(id, errors="replace")):
            assert client.request(method, f"{place}/{path}").status_code < 500
    assert client.get("/v1/items", params={"limit": id, "seed": id}).status_code < 500


def test_slow_senders_are_cut_off_and_left_requests_dropped(tmp_path: Path):
    embedder = StandinEmbedder()
    app = create_app(embedder, StandinIndex(), limits=Limits(seconds=1.5, window_ms=0))
    service = app.state.service
    head = b"POST /v1/embeddings HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: 14\r\n\r\n"
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
