"""The service with a trained model and a real index."""

from __future__ import annotations

import base64
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from starlette.testclient import TestClient

from fastvlp.cli import main
from fastvlp.data.records.shards import Shards
from fastvlp.search.embedder import Embedder
from fastvlp.search.engines.interface import open_index, pictures_of
from fastvlp.search.indexing import build_index
from fastvlp.serve.api import create_app
from tests.installed import skip_without

skip_without("chromadb", install="-e '.[serve]'")


@pytest.fixture
def index(exports: dict[str, Path], world: Path, tmp_path: Path) -> str:
    """An index of the test pictures, by the model that also captions and matches."""
    build_index(str(tmp_path / "index"), export=str(exports["all"]), data=str(world / "test"))
    return str(tmp_path / "index")


@pytest.fixture
def client(exports: dict[str, Path], index: str) -> Iterator[TestClient]:
    embedder = Embedder.load(exports["all"], "cpu")
    app = create_app(embedder, open_index(index, embedder.stamp), pictures=pictures_of(index))
    with TestClient(app, "http://localhost") as client:
        yield client


def hits(answer: Any) -> list[str]:
    assert answer.status_code == 200, answer.text
    return [hit["id"] for hit in answer.json()["results"]]


def test_the_service_answers_as_the_model_and_the_index_do(client, exports, world):
    shards, embedder = Shards(world / "test"), Embedder.load(exports["all"], "cpu")
    picture = shards.read(3).images[0]
    text = shards.info(3)["captions"][0]
    body = {"input": [text, {"image": base64.b64encode(picture).decode()}]}
    rows = [row["embedding"] for row in client.post("/v1/embeddings", json=body).json()["data"]]
    expected = np.concatenate([embedder.texts([text]), embedder.images([picture])])
    np.testing.assert_allclose(rows, expected, atol=1e-5)
    results = client.post("/v1/search", files={"image": picture}).json()["results"]
    assert results[0]["id"] == shards.key(3) and results[0]["score"] == pytest.approx(1, abs=1e-4)
    assert results[0]["info"]["caption"] == text and client.get(results[0]["image"]).status_code == 200
    assert len(results) == 12
    caption = client.post("/v1/caption", files={"image": picture}).json()["caption"]
    assert caption == embedder.caption([picture])[0]
    score = client.post("/v1/score", files={"image": picture}, data={"text": text}).json()["scores"][0]
    assert score["similarity"] == pytest.approx(float(expected[0] @ expected[1]), abs=1e-5)
    assert score["match"] == pytest.approx(float(embedder.match([picture], [text])[0]), abs=1e-4)
    reranked = client.post("/v1/search", json={"text": text, "rerank": 12}).json()["results"]
    assert [hit["match"] for hit in reranked] == sorted((hit["match"] for hit in reranked), reverse=True)
    assert client.post("/v1/answer", json={"id": shards.key(3), "question": "?"}).status_code == 404


def test_items_are_added_found_and_deleted(client, world):
    picture = Shards(world / "val").read(0).images[0]
    added = client.post("/v1/items", files={"image": picture}, data={"id": "new/一", "info": '{"year": 2024}'})
    assert added.status_code == 201, added.text
    assert hits(client.post("/v1/search", files={"image": picture}))[0] == "new/一"
    assert hits(client.post("/v1/search", json={"text": "a", "where": {"year": [2023, 2024]}})) == ["new/一"]
    assert "new/一" not in hits(client.post("/v1/search", json={"id": "new/一"}))
    assert client.delete("/v1/items/new/一").json()["deleted"]
    assert "new/一" not in hits(client.post("/v1/search", files={"image": picture}))


@pytest.mark.slow
def test_the_command_serves_until_sigterm(exports, index):
    command = [sys.executable, "-m", "fastvlp", "serve", str(exports["all"]), "--index", index, "--port", "0"]
    served = subprocess.Popen([*command, "--api-key", "sesame", "--pixels", "100"], stdout=subprocess.PIPE, text=True)
    try:
        assert served.stdout is not None
        address, _, description = served.stdout.readline().partition("  ")
        assert "all, 12 items" in description
        with httpx.Client(base_url=address, headers={"authorization": "Bearer sesame"}) as client:
            assert client.get("/").status_code == 200
            assert len(hits(client.post("/v1/search", json={"text": "a red circle"}))) == 12
            too_large = client.post("/v1/caption", json={"id": hits(client.get("/v1/items"))[0]})
            assert too_large.status_code == 400 and "100 allowed" in too_large.text
        served.send_signal(signal.SIGTERM)
        served.wait(20)
    finally:
        served.kill()


def test_what_cannot_be_served_is_reported(exports, index, tmp_path, capsys):
    towers = str(exports["towers"])
    for arguments, words in (
        ([str(tmp_path)], "not an export"),
        ([towers, "--index", index], "another model"),
        ([towers, "--index", str(tmp_path / "none")], "none"),
        ([towers, "--host", "no.such.host.invalid"], "cannot listen"),
        ([towers, "--api-key", "schlüssel"], "--api-key"),
    ):
        assert main(["serve", *arguments, "--port", "0"]) == 2
        assert words in capsys.readouterr().err
