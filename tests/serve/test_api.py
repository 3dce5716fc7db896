"""Answers of the HTTP API, and its errors."""

from __future__ import annotations

import base64
import io
import shutil
import threading
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

from fastvlp.errors import UserError
from fastvlp.search.calibration import Calibration
from fastvlp.serve.api import create_app
from fastvlp.serve.batcher import InputError
from fastvlp.serve.limits import Limits
from fastvlp.serve.service import search_together
from tests.serve.standins import COLOURS, StandinEmbedder, StandinIndex, b64, hashed, opened, picture, refused, shade


def search(client: TestClient, **body: Any) -> list[str]:
    """Ids of the results."""
    answer = client.post("/v1/search", json=body)
    assert answer.status_code == 200, answer.text
    return [hit["id"] for hit in answer.json()["results"]]


def test_embeddings_have_openais_shape(client: TestClient):
    body = {"input": ["red", {"image": b64(shade("red", 0))}, "green"], "model": "standin"}
    answer = client.post("/v1/embeddings", json=body).json()
    assert answer["object"] == "list" and answer["model"] == "standin" and answer["fingerprint"] == "f" * 32
    assert [row["index"] for row in answer["data"]] == [0, 1, 2]
    vectors = np.array([row["embedding"] for row in answer["data"]], np.float32)
    np.testing.assert_array_equal(vectors[0], hashed(b"red", 16))
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    assert vectors[1] @ vectors[0] > 0.9 > vectors[2] @ vectors[0]
    assert answer["usage"] == {"prompt_tokens": 6, "total_tokens": 6}
    one = client.post("/v1/embeddings", json={"input": "red", "encoding_format": "base64"}).json()["data"][0][
        "embedding"
    ]
    np.testing.assert_array_equal(np.frombuffer(base64.b64decode(one), "<f4"), vectors[0])


def test_a_form_equals_json(client: TestClient):
    data = shade("blue", 1)
    json = client.post("/v1/embeddings", json={"input": ["red", {"image": f"data:image/png;base64,{b64(data)}"}]})
    form = client.post("/v1/embeddings", files=[("input", (None, "red")), ("image", ("x.png", data))])
    assert form.json() == json.json()
    body = {"text": "red", "limit": "2", "where": '{"shade": 1}'}
    searched = client.post("/v1/search", data=body, files={"image": data}).json()
    same = client.post("/v1/search", json={"text": "red", "limit": 2, "where": {"shade": 1}, "image": b64(data)}).json()
    assert searched["results"] == same["results"] != []


def test_search_by_text_picture_both_and_item(client: TestClient):
    assert {*search(client, text="红色", limit=3)} == {"red/0", "red/1", "red/2"}
    assert search(client, image=b64(shade("green", 2)), limit=1) == ["green/2"]
    assert {id.split("/")[0] for id in search(client, text="red", image=b64(shade("blue", 0)), limit=6)} == {
        "red",
        "blue",
    }
    by_item = search(client, id="blue/1", limit=2)
    assert by_item == ["blue/0", "blue/2"] or by_item == ["blue/2", "blue/0"], "all but itself"
    refused(client.post("/v1/search", json={"id": "nobody"}), 404, "nobody")


def test_search_filters_and_pages(client: TestClient):
    everything = search(client, text="red", limit=12)
    answer, pages = {"next_offset": 0}, []
    while (offset := answer["next_offset"]) is not None:
        answer = client.post("/v1/search", json={"text": "red", "limit": 5, "offset": offset}).json()
        pages.append([hit["id"] for hit in answer["results"]])
    assert [len(page) for page in pages] == [5, 5, 2] and [*chain(*pages)] == everything
    without = [id for id in everything if id != "red/1"]
    paged = search(client, id="red/1", limit=6) + search(client, id="red/1", limit=6, offset=6)
    assert sorted(paged) == sorted(without) and len(paged) == 11
    assert {*search(client, text="red", where={"shade": 2})} == {f"{colour}/2" for colour in COLOURS}
    assert search(client, text="red", where={"shade": 2, "caption": "blue picture"}) == ["blue/2"]
    assert {*search(client, text="red", where={"shade": [0, 9]})} == {f"{colour}/0" for colour in COLOURS}
    assert search(client, text="red", where={"shade": 9}) == []


def test_rerank_scores_the_best_results_again(tmp_path: Path):
    class Contrary(StandinEmbedder):
        def match(self, pictures: Any, texts: Any) -> np.ndarray:
            return -super().match(pictures, texts)

    with opened(tmp_path, Contrary()) as client:
        for id, colour in (("a", "red"), ("b", "blue"), ("c", "green")):
            client.post("/v1/items", data={"id": id}, files={"image": shade(colour, 0)})
        plain = search(client, text="red")
        answer = client.post("/v1/search", json={"text": "red", "rerank": 2}).json()["results"]
        assert plain[0] == "a"
        assert [hit["id"] for hit in answer] == [plain[1], "a", plain[2]]
        assert [hit.get("match") for hit in answer] == [0.0, -1.0, None]
        assert search(client, text="red", rerank=2, offset=1, limit=1) == ["a"]
        refused(client.post("/v1/search", json={"id": "a", "rerank": 2}), 400, "text")


def test_pairs_are_scored(client: TestClient):
    pairs = [{"text": "red", "id": "red/0"}, {"text": "red", "image": b64(shade("blue", 0))}]
    scores = client.post("/v1/score", json={"pairs": pairs}).json()["scores"]
    assert scores[0]["similarity"] > 0.9 > scores[1]["similarity"]
    assert [score["match"] for score in scores] == [1.0, 0.0]
    form = [("text", (None, "red")), ("text", (None, "blue")), ("image", ("x", shade("blue", 0)))]
    assert [score["match"] for score in client.post("/v1/score", files=form).json()["scores"]] == [0.0, 1.0]


def test_cut_texts_and_unknown_words_are_told(client: TestClient):
    long, image = " ".join(["red"] * 35), b64(shade("red", 0))
    cut, odd = {"cut": "red red red red red", "unknown": []}, {"cut": None, "unknown": ["qat"]}
    answer = client.post("/v1/embeddings", json={"input": ["red", {"image": image}, long, "a qat"]}).json()
    assert answer["notes"] == [{"index": 2, **cut}, {"index": 3, **odd}]
    assert answer["usage"]["prompt_tokens"] == 3 + 32 + 4
    pairs = [{"text": text, "image": image} for text in (long, "red", "qat")]
    assert client.post("/v1/score", json={"pairs": pairs}).json()["notes"] == [{"index": 0, **cut}, {"index": 2, **odd}]
    for body, notes in (({"text": long}, [{"index": 0, **cut}]), ({"text": "red"}, []), ({"image": image}, [])):
        assert client.post("/v1/search", json=body).json()["notes"] == notes
    assert client.post("/v1/answer", json={"image": image, "question": "qat"}).json()["notes"] == [{"index": 0, **odd}]


def test_results_say_how_near_they_are(tmp_path: Path):
    """Between the cosine of random pairs, 0, and that of pictures with their own captions, 1."""
    index = StandinIndex(Calibration(random=0.2, own=0.7, near=0.6, images=0.5))
    with opened(tmp_path, index=index) as client:
        for colour in COLOURS:
            client.post("/v1/items", data={"id": colour}, files={"image": shade(colour, 0)})
        near, far = (client.post("/v1/search", json={"text": text}).json() for text in ("red", "unheard of"))
        assert near["near"] is True and far["near"] is False
        for hit in near["results"] + far["results"]:
            assert hit["relevance"] == pytest.approx(min(1, max(0, (hit["score"] - 0.2) / 0.5)))
        later = client.post("/v1/search", json={"text": "red", "offset": 2}).json()
        assert later["near"] is True
        by_item = client.post("/v1/search", json={"id": "red"}).json()
        assert by_item["near"] is None
        for hit in by_item["results"]:
            assert hit["relevance"] == pytest.approx(min(1, max(0, (hit["score"] - 0.5) / 0.5)))
        both = client.post("/v1/search", json={"id": "red", "text": "red"}).json()
        assert both["near"] is None and {hit["relevance"] for hit in both["results"]} == {None}


def test_results_say_where_the_model_cannot_tell(tmp_path: Path):
    for reached, can_tell in ((0.04, True), (0.3, False)):
        index = StandinIndex(Calibration(random=0.2, own=0.7, near=0.6, images=0.5, reached=reached))
        with opened(tmp_path / str(reached), index=index) as client:
            client.post("/v1/items", data={"id": "red"}, files={"image": shade("red", 0)})
            by_text = client.post("/v1/search", json={"text": "red"}).json()
            assert by_text["can_tell"] is can_tell and (by_text["near"] is None) == (not can_tell)
            assert {hit["relevance"] is None for hit in by_text["results"]} == {not can_tell}
            assert client.post("/v1/search", json={"id": "red"}).json()["can_tell"] is None


def test_health_has_the_languages_of_the_model(tmp_path: Path):
    embedder = StandinEmbedder()
    for languages in (["en"], ["en", "zh"], []):
        embedder.languages = languages
        with opened(tmp_path, embedder) as client:
            assert client.get("/health").json()["languages"] == languages


def test_the_guide_names_every_route(client: TestClient):
    guide = (Path(__file__).parents[2] / "docs/guide/search.md").read_text(encoding="utf-8")
    table = guide.partition("| route |")[2].partition("\n\n")[0]
    for path in client.get("/openapi.json").json()["paths"]:
        assert f"{path.replace('{id}', 'ID')}`" in table, path


def test_captions_and_answers(client: TestClient):
    assert client.post("/v1/caption", json={"id": "red/0"}).json()["caption"] == "a red picture"
    answer = client.post("/v1/answer", files={"image": shade("blue", 0)}, data={"question": "which colour?"})
    assert answer.json()["answer"] == "blue"


def test_missing_abilities_are_refused(tmp_path: Path):
    with opened(tmp_path, StandinEmbedder(can=("embed",))) as client:
        image = b64(shade("red", 0))
        refused(client.post("/v1/caption", json={"image": image}), 404, "cannot caption")
        refused(client.post("/v1/answer", json={"image": image, "question": "?"}), 404, "cannot answer")
        refused(client.post("/v1/search", json={"text": "a", "rerank": 4}), 404, "cannot match")
        assert [*client.post("/v1/score", json={"pairs": [{"text": "red", "image": image}]}).json()["scores"][0]] == [
            "similarity"
        ]
        refused(client.get("/report"), 404, "--report")
    with opened(tmp_path, index=None) as client:
        refused(client.post("/v1/search", json={"text": "a"}), 404, "--index")
        assert client.get("/health").json()["items"] == 0


def test_items_are_added_read_and_deleted(client: TestClient):
    data = picture((9, 9, 9), side=900, format="JPEG")
    added = client.post("/v1/items", files={"image": data}).json()
    assert client.get("/health").json()["items"] == 13
    again = client.post("/v1/items", json={"image": b64(data), "caption": "dark"}).json()
    assert again["id"] == added["id"] and client.get("/health").json()["items"] == 13
    kept = client.get(added["image"])
    assert kept.headers["content-type"] == "image/webp" and Image.open(io.BytesIO(kept.content)).size == (320, 320)
    assert client.get("/v1/pictures/red%2F0").status_code == 200
    assert client.delete(f"/v1/items/{added['id']}").json() == {"id": added["id"], "deleted": True}
    refused(client.delete(f"/v1/items/{added['id']}"), 404, "no item")
    refused(client.get(added["image"]), 404, "no picture")
    item = client.get("/v1/items/red%2F1").json()
    assert item == {"id": "red/1", "info": {"shade": 1, "caption": "red picture"}, "image": "/v1/pictures/red%2F1"}
    refused(client.get("/v1/items/nobody"), 404, "no item")
    assert len(client.get("/v1/items?limit=5").json()["results"]) == 5


def test_an_item_without_a_picture_has_no_link(client: TestClient, tmp_path: Path):
    shutil.rmtree(tmp_path / "pictures")
    assert client.post("/v1/items", files={"id": (None, "new"), "image": shade("white", 0)}).json()["image"]
    results = client.post("/v1/search", json={"text": "white", "limit": 13}).json()["results"]
    assert {hit["id"] for hit in results if hit["image"]} == {"new"} and len(results) == 13
    assert client.get("/v1/items/red%2F1").json()["image"] is None
    app = create_app(StandinEmbedder(), StandinIndex(), pictures=None)
    with TestClient(app, "http://localhost") as without:
        assert without.post("/v1/items", files={"image": shade("red", 0)}).json()["image"] is None
        (item,) = without.get("/v1/items").json()["results"]
        assert item["image"] is None


def test_requests_share_batches_and_one_thread(tmp_path: Path):
    embedder = StandinEmbedder()
    with opened(tmp_path, embedder, limits=Limits(window_ms=100)) as client:
        answers: list[int] = []

        def ask(i: int) -> None:
            answers.append(client.post("/v1/embeddings", json={"input": f"text {i}"}).status_code)

        threads = [threading.Thread(target=ask, args=(i,)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert answers == [200] * 8 and sum(embedder.batches) == 8 and len(embedder.batches) < 8
        assert len(embedder.threads) == 1
        text = client.get("/metrics").text
        assert 'fastvlp_batch_rows_sum{kind="texts"} 8' in text
        assert 'fastvlp_request_seconds_count{route="/v1/embeddings",status="200"} 8' in text
        assert "fastvlp_resident_memory_bytes" in text


def test_waiting_searches_share_a_call():
    class Counting(StandinIndex):
        def search(self, vectors: np.ndarray, k: int, where: Any = None, offset: int = 0) -> Any:
            calls.append(len(vectors))
            if where and "broken" in where:
                raise UserError("no such field")
            return super().search(vectors, k, where, offset)

    calls: list[int] = []
    index = Counting()
    rows = np.stack([hashed(bytes([i]), 16) for i in range(6)])
    index.add([*"abcdef"], rows, [{"even": i % 2 == 0} for i in range(6)])
    searches = [(rows[i], 1 + i % 2, {"even": True} if i == 4 else {}) for i in range(6)]
    results = search_together(index, searches)
    assert calls == [2, 3, 1] and [len(hits) for hits in results] == [1, 2, 1, 2, 1, 2]
    assert [hits[0].id for hits in results] == [*"abcdef"]
    with pytest.raises(InputError, match="no such field") as bad:
        search_together(index, [*searches, (rows[0], 1, {"broken": 1})])
    assert bad.value.row == 6


def test_a_busy_service_says_when_to_try_again(tmp_path: Path):
    embedder = StandinEmbedder()
    embedder.gate.clear()
    with opened(tmp_path, embedder, limits=Limits(waiting=2, window_ms=0)) as client:
        answer = client.post("/v1/embeddings", json={"input": ["a", "b", "c"]})
        refused(answer, 503, "wait")
        assert int(answer.headers["retry-after"]) >= 1
    with opened(tmp_path, embedder, limits=Limits(seconds=0.3, window_ms=0)) as client:
        late = client.post("/v1/embeddings", json={"input": "a"})
        refused(late, 503, "no answer within")
        assert int(late.headers["retry-after"]) >= 1
        embedder.gate.set()
    with opened(tmp_path, limits=Limits(requests=0)) as client:
        refused(client.get("/health"), 503, "requests")
    with opened(tmp_path, limits=Limits(held_mb=0)) as client:
        refused(client.post("/v1/embeddings", json={"input": "a"}), 503, "memory")


def test_a_report_is_shown(tmp_path: Path):
    (tmp_path / "report.html").write_text("<h1>Report</h1>")
    with opened(tmp_path, report=tmp_path / "report.html") as client:
        assert client.get("/report").text == "<h1>Report</h1>" and client.get("/health").json()["report"]
