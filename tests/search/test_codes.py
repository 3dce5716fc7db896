"""The index engine of embedded vectors: codes:FOLDER."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from starlette.testclient import TestClient

from fastvlp.cli import main
from fastvlp.data.records.shards import Shards
from fastvlp.errors import UserError
from fastvlp.search.bulk import embed_shards
from fastvlp.search.embedded import PLAN, Part, open_embedded, part_bytes, part_file, read_part, write_plan
from fastvlp.search.embedder import Embedder
from fastvlp.search.engines.codes import VECTORS, CodesIndex
from fastvlp.search.engines.interface import Item, Stamp, open_index, pictures_of
from fastvlp.search.thumbnails import thumbnail
from fastvlp.serve.api import create_app


@pytest.fixture
def folder(exports, world, tmp_path):
    embed_shards(exports["towers"], world / "test", tmp_path / "vectors", per_part=5)
    return tmp_path / "vectors"


@pytest.fixture
def index(folder):
    return open_index(f"codes:{folder}")


def test_search_ranks_as_the_exact_product_does(index, folder):
    parts = [read_part(path) for path in open_embedded(folder).parts]
    vectors, ids = np.concatenate([part.image for part in parts]), [id for part in parts for id in part.ids]
    infos = [info for part in parts for info in part.infos]
    queries = np.concatenate([vectors[3:5], parts[0].text[:2]])
    for query, hits in zip(queries, index.search(queries, 5, offset=1)):
        best = np.argsort(-(vectors @ query), kind="stable")[1:6]
        assert [hit.id for hit in hits] == [ids[place] for place in best]
        assert np.allclose([hit.score for hit in hits], (vectors @ query)[best], atol=1e-6)
        assert [hit.info for hit in hits] == [infos[place] for place in best]
    assert index.count() == len(ids) and index.stamp == open_embedded(folder).stamp
    (item,) = index.get(["nobody", ids[7]])
    assert isinstance(item, Item) and item.id == ids[7] and np.array_equal(item.vector, vectors[7])


def test_filters_take_a_value_or_a_list_of_values(index, folder):
    part = read_part(open_embedded(folder).parts[0])
    name, value = next(iter(part.infos[1].items()))
    hits = index.search(part.image[:1], 12, {name: [value, "another"]})[0]
    assert hits and all(hit.info[name] == value for hit in hits)
    assert index.search(part.image[:1], 12, {name: "nothing"}) == [[]]


@pytest.mark.parametrize("small", [2**25, 0])
def test_many_equal_vectors_hide_no_other(tmp_path, monkeypatch, small):
    monkeypatch.setattr(CodesIndex, "small", small)
    rng = np.random.default_rng(0)
    centre = rng.normal(size=16)
    vectors = np.concatenate([np.repeat(centre[None], 3000, 0), 2 * centre + rng.normal(size=(300, 16))])
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    ids = [f"i{i}" for i in range(len(vectors))]
    infos = [{"n": i} for i in range(len(ids))]
    part = Part(ids, [*range(len(ids))], infos, vectors, [], vectors[:0], np.zeros(0, np.int64), [])
    plan = {"stamp": vars(Stamp(fingerprint="f" * 32, width=16)), "data": "", "records": len(ids), "per_part": 10**6}
    write_plan(tmp_path / PLAN, plan)
    part_file(tmp_path, 0).write_bytes(part_bytes(part))
    index = open_index(f"codes:{tmp_path}")
    assert [hits[0].id for hits in index.search(vectors[3000:], 1)] == ids[3000:]
    hits = index.search(vectors[:1], 3010)[0]
    assert {hit.id for hit in hits[:3000]} == {*ids[:3000]} and len(hits) == 3010
    page = index.search(vectors[:1], 3, offset=2999)[0]
    assert [hit.id for hit in page] == [hit.id for hit in hits[2999:3002]]
    assert [hit.id for hit in index.search(vectors[:1], 2, {"n": [7, 3005]})[0]] == ["i7", "i3005"]


def test_vectors_are_written_to_disk_once(index, folder):
    made = (folder / VECTORS).stat()
    assert isinstance(index.get([index.search(np.eye(1, 16), 1)[0][0].id])[0].vector, np.ndarray)
    assert (folder / VECTORS).stat().st_mtime_ns == made.st_mtime_ns and open_index(f"codes:{folder}").count() == 12
    np.save(folder / VECTORS, np.zeros((3, 16), np.float32))
    with pytest.raises(UserError, match="delete it"):
        CodesIndex(f"codes:{folder}")


def test_changes_and_wrong_folders_are_refused(index, folder, tmp_path):
    for change in (lambda: index.add(["a"], np.eye(1, 16), [{}]), lambda: index.delete(["a"])):
        with pytest.raises(UserError, match="vlp index build"):
            change()
    with pytest.raises(UserError, match="another model"):
        open_index(f"codes:{folder}", Stamp(fingerprint="f" * 32, width=16))
    with pytest.raises(UserError, match=r"nowhere: .*`vlp embed`.*embedded\.json"):
        open_index(f"codes:{tmp_path}/nowhere")
    with pytest.raises(UserError, match=f"codes:{folder}"):
        open_index(str(folder))


def test_pictures_are_read_from_the_shards(index, folder, world, tmp_path):
    kept = pictures_of(f"codes:{folder}")
    for hit in index.search(np.eye(1, 16), 12)[0]:
        (place,) = (i for i, key in enumerate(Shards(world / "test").keys) if key == hit.id)
        assert kept.get(hit.id) == thumbnail(Shards(world / "test").read(place).images[0])
    assert kept.get("nobody") is None
    with pytest.raises(UserError, match="vlp index build"):
        kept.put(hit.id, b"another")
    plan = json.loads((folder / PLAN).read_text())
    moved = shutil.copytree(world / "test", tmp_path / "moved")
    (folder / PLAN).write_text(json.dumps(plan | {"data": str(moved)}))
    kept = pictures_of(f"codes:{folder}")
    for tar in moved.glob("*.tar"):
        tar.unlink()
    assert kept.get(hit.id) is None and pictures_of(f"codes:{folder}") is None


def test_the_service_shows_pictures_and_refuses_additions(index, folder, exports, pictures, tmp_path):
    def shown_picture(store):
        app = create_app(Embedder.load(exports["towers"], "cpu"), index, pictures=store)
        with TestClient(app, "http://localhost", raise_server_exceptions=False) as client:
            first = client.get("/v1/items").json()["results"][0]
            added = client.post("/v1/items", data={"id": first["id"]}, files={"image": pictures[0]})
            assert added.status_code == 400 and "vlp index build" in added.text
            return first["image"] and client.get(first["image"])

    assert shown_picture(pictures_of(f"codes:{folder}")).headers["content-type"] == "image/webp"
    assert shown_picture(pictures_of(f"codes:{folder}", tmp_path / "own")) is None
    assert not (tmp_path / "own").exists()


def test_codes_are_searched_from_the_command_line(folder, exports, capsys):
    argv = ["index", "search", f"codes:{folder}", "--export", str(exports["towers"])]
    assert main([*argv, "--text", "一个红色圆", "--k", "2"]) == 0
    output = capsys.readouterr().out
    assert sum(id in output for part in open_embedded(folder).parts for id in read_part(part).ids) == 2
