"""A public model is embedded with, indexed with and served as it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import uvicorn
from starlette.testclient import TestClient

from fastvlp.cli import main
from fastvlp.errors import UserError
from fastvlp.search.embedder import Embedder

pytest.importorskip("transformers", reason="transformers is not installed: pip install -e '.[towers]'")

from tests.convert.public_models import TEXTS, write_model
from tests.installed import skip_without

skip_without("chromadb", install="-e '.[serve]'")


@pytest.fixture(scope="module")
def public(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model("clip", tmp_path_factory.mktemp("public") / "clip-tiny").folder


def test_a_public_folder_is_what_its_export_is(public: Path, tmp_path: Path):
    for command in (
        ["convert", str(public), str(tmp_path / "run")],
        ["export", str(tmp_path / "run"), str(tmp_path / "out")],
    ):
        assert main(command) == 0
    exported, direct = Embedder.load(tmp_path / "out", "cpu"), Embedder.load(public, "cpu")
    np.testing.assert_allclose(direct.texts(TEXTS), exported.texts(TEXTS), atol=1e-6)
    assert direct.can == {"embed"} and direct.max_length == exported.max_length
    assert direct.transform == exported.transform
    assert Embedder.load(public).fingerprint == direct.fingerprint


def test_it_is_served_with_an_index(public: Path, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    index = str(tmp_path / "index")
    assert main(["index", "build", index, "--export", str(public), "--data", str(world / "test")]) == 0

    def ask(server: Any, sockets: Any) -> None:
        with TestClient(server.config.app, "http://localhost") as client:
            (model,) = client.get("/v1/models").json()["data"]
            assert model["id"] == str(public) and model["object"] == "model" and model["can"] == ["embed"]
            for id in (model["id"], model["fingerprint"]):
                assert client.get(f"/v1/models/{id}").json() == model
            assert client.get("/v1/models/other").status_code == 404
            body = {"input": "a red circle", "model": model["id"]}
            vector = client.post("/v1/embeddings", json=body).json()["data"][0]["embedding"]
            assert len(vector) == model["width"]
            assert len(client.post("/v1/search", json={"text": "a red circle"}).json()["results"]) == 12
            asked.append(1)

    asked: list[int] = []
    monkeypatch.setattr(uvicorn.Server, "run", ask)
    assert main(["serve", str(public), "--index", index, "--port", "0"]) == 0 and asked


def test_what_is_no_model_is_told(tmp_path: Path):
    with pytest.raises(UserError, match="not an export"):
        Embedder.load(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(UserError, match="no weights"):
        Embedder.load(tmp_path)
