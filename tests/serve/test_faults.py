"""Failures around the model: a failing engine, a full disk, bad headers, odd ids."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest
from starlette.testclient import TestClient
from starlette.types import Message

from fastvlp.search.checks import EngineError
from fastvlp.search.embedder import Embedder
from fastvlp.search.engines.interface import open_index
from fastvlp.serve.access import Access
from fastvlp.serve.api import create_app
from fastvlp.serve.guard import Guard
from fastvlp.serve.limits import Limits, Memory
from fastvlp.serve.monitoring import Metrics
from tests.search.made_items import STAMP, made_vectors
from tests.serve.standins import StandinEmbedder, StandinIndex, b64, opened, picture, refused, shade


class Away(StandinIndex):
    """An engine whose server is away."""

    def count(self) -> int:
        raise EngineError("/home/me/index: disk full")

    def search(self, *arguments: Any, **options: Any) -> Any:
        raise EngineError("/home/me/index: disk full")


def test_a_failing_engine_is_reported_without_its_path(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    with opened(tmp_path, index=Away()) as client:
        answer = client.post("/v1/search", json={"text": "red"})
        refused(answer, 503, "the index")
        assert "/home" not in answer.text and int(answer.headers["retry-after"]) >= 1
    assert "/home/me/index: disk full" in caplog.text


def test_a_damaged_folder_and_a_full_disk_give_503(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    pytest.importorskip("chromadb", reason="chromadb is not installed: pip install -e '.[serve]'")
    index = open_index(str(tmp_path / "index"), STAMP, create=True)
    index.add(["a"], made_vectors(1), [{}])
    (tmp_path / "pictures").write_text("no folder")
    with opened(tmp_path, index=index) as client:
        assert client.post("/v1/search", json={"text": "red"}).status_code == 200
        unwritten = client.post("/v1/items", files={"image": shade("red", 0)})
        assert unwritten.status_code == 503 and str(tmp_path) not in unwritten.text
        index._collection, index._measured = None, False  # what a damaged folder does to it
        broken = client.post("/v1/search", json={"text": "red"})
        assert broken.status_code == 503 and str(tmp_path) not in broken.text
    assert "cannot write" in caplog.text and "folder damaged" in caplog.text
    other = open_index(str(tmp_path / "index"), STAMP)
    other._lock.take()
    (tmp_path / "pictures").unlink()
    with opened(tmp_path, index=open_index(str(tmp_path / "index"), STAMP)) as client:
        locked = client.post("/v1/items", files={"image": shade("red", 0)})
        assert locked.status_code == 503 and str(tmp_path) not in locked.text
    other.close()


def test_the_model_answers_while_its_engine_fails_or_is_busy(tmp_path: Path):
    class Busy(StandinIndex):
        def count(self) -> int:
            busy.wait(20)
            return 0

    busy = threading.Event()
    for index in (Away(), Busy()):
        busy.clear()
        with opened(tmp_path, index=index) as client:
            health = client.get("/health")
            assert health.status_code == 200 and health.json()["status"] == "ok" and health.json()["items"] is None
            text = client.get("/metrics")
            assert text.status_code == 200 and "fastvlp_waiting 0" in text.text and "fastvlp_items" not in text.text
            busy.set()


def test_too_large_pictures_are_refused_by_their_sent_size(exports: dict[str, Path]):
    """The model's own size is none of the sender's business."""
    embedder = Embedder.load(exports["all"], "cpu")
    with TestClient(
        create_app(embedder, limits=Limits(pixels=100)), "http://localhost", raise_server_exceptions=False
    ) as client:
        small = b64(picture((200, 30, 30), side=8))
        assert client.post("/v1/caption", json={"image": small}).status_code == 200
        assert "match" in client.post("/v1/score", json={"pairs": [{"text": "a", "image": small}]}).json()["scores"][0]
        refused(client.post("/v1/caption", json={"image": b64(shade("red", 0))}), 400, "100 allowed")


def test_later_pages_are_not_reranked(tmp_path: Path):
    class Counting(StandinEmbedder):
        def match(self, pixels: Any, texts: Sequence[str]) -> np.ndarray:
            read.append(len(texts))
            return super().match(pixels, texts)

    read: list[int] = []
    with opened(tmp_path, Counting()) as client:
        for i in range(6):
            client.post("/v1/items", data={"id": f"i{i}"}, files={"image": shade("red", i)})
        plain = client.post("/v1/search", json={"text": "red"}).json()["results"]
        body = {"text": "red", "rerank": 4, "limit": 2}
        pages = [client.post("/v1/search", json=body | {"offset": at}).json()["results"] for at in (0, 2, 4)]
        assert sum(read) == 8 and {hit["id"] for page in pages for hit in page} == {f"i{i}" for i in range(6)}
        assert pages[2] == plain[4:]


def test_scores_need_a_model_that_embeds_or_matches(tmp_path: Path):
    image = b64(shade("red", 0))
    with opened(tmp_path, StandinEmbedder(can=("match",))) as client:
        body = {"pairs": [{"text": "red " * 1000, "image": image}]}
        refused(client.post("/v1/score", json=body), 400, "4000 characters")
        body = {"pairs": [{"text": "red", "image": image}]}
        assert client.post("/v1/score", json=body).json()["scores"] == [{"match": 1.0}]
    with opened(tmp_path, StandinEmbedder(can=("answer",))) as client:
        refused(client.post("/v1/score", json=body), 404, "cannot match; it can answer")


def test_ids_may_end_in_anything(tmp_path: Path):
    with opened(tmp_path) as client:
        for id in ("a", "a/image", "pictures/a", "a/image/image"):
            added = client.post("/v1/items", data={"id": id}, files={"image": shade("red", len(id))}).json()
            assert client.get(f"/v1/items/{quote(id, safe='')}").json() == added
        shown = {client.get(f"/v1/pictures/{id}").content for id in ("a", "a/image", "pictures/a", "a/image/image")}
        assert len(shown) == 4
        assert client.delete("/v1/items/a/image").json()["id"] == "a/image"
        refused(client.get("/v1/pictures/a/image"), 404, "no picture")


@pytest.mark.parametrize("origin", ["http://[", "null", "testserver", "http://[::1]:99999999", "://"])
def test_malformed_origins_are_refused(tmp_path: Path, origin: str):
    with opened(tmp_path) as client:
        refused(client.post("/v1/embeddings", json={"input": "a"}, headers={"origin": origin}), 403, "may not use")


def test_all_sites_may_be_allowed(tmp_path: Path):
    with opened(tmp_path, origins=("*",)) as client:
        answer = client.post("/v1/embeddings", json={"input": "a"}, headers={"origin": "https://elsewhere.example"})
        assert answer.is_success and answer.headers["access-control-allow-origin"] == "*"


def test_a_cookie_is_renewed_without_a_token(tmp_path: Path):
    with opened(tmp_path, keys=("a key; with=signs",)) as client:
        assert client.post("/session", headers={"authorization": "Bearer a key; with=signs"}).is_success
        for headers in ({}, {"authorization": "Basic other"}):
            assert client.post("/session", headers=headers).is_success
            assert client.get("/v1/items").is_success


def test_the_size_of_a_body_is_counted_in_linear_time():
    class Piece(bytes):
        def __len__(self) -> int:
            nonlocal weighed
            weighed += 1
            return super().__len__()

    weighed, bodies = 0, list[bytes]()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        bodies.append((await receive())["body"])

    async def ask() -> None:
        pieces = [{"type": "http.request", "body": Piece(b"ab"), "more_body": i < 99} for i in range(100)]

        async def receive() -> Message:
            return pieces.pop(0) if pieces else await asyncio.Future()

        async def send(message: Message) -> None:
            pass

        memory = Memory(1e9)
        guard = Guard(app, limits=Limits(), access=Access(), origins=(), metrics=Metrics(), memory=memory)
        await guard(
            {"type": "http", "method": "POST", "path": "/", "headers": [(b"host", b"localhost")]}, receive, send
        )
        assert memory.held == 0

    asyncio.run(ask())
    assert bodies == [b"ab" * 100] and weighed <= 400
