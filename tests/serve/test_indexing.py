"""From vectors to an index and back: what is searched for is found, pictures are kept, and a second build changes nothing."""

import shutil
from dataclasses import replace

import numpy as np
import pytest

from fastvlp.batch import Record
from fastvlp.cli import main
from fastvlp.data.records.shards import Shards, ShardWriter
from fastvlp.errors import UserError
from fastvlp.search import indexing
from fastvlp.search.bulk import embed
from fastvlp.search.index import open_index, pictures_of
from fastvlp.search.pictures import thumbnail
from fastvlp.serve.options import Embed, IndexBuild, IndexSearch

pytest.importorskip("chromadb", reason="chromadb is not installed: pip install -e '.[serve]'")


@pytest.fixture(scope="session")
def embedded(exports, world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("embedded") / "test"
    embed(Embed(export=str(exports["towers"]), data=str(world / "test"), out=folder, per_part=5))
    return folder


@pytest.fixture
def told(embedded, tmp_path):
    return IndexBuild(index=str(tmp_path / "index"), embedded=embedded)


def test_images_are_found_by_their_own_pictures(told, exports, shards, pictures, tmp_path):
    assert indexing.build(told) == {"images": 12, "dropped": []}
    (tmp_path / "query.png").write_bytes(pictures[4])
    asked = IndexSearch(index=told.index, export=str(exports["towers"]), image=tmp_path / "query.png", k=3)
    best = indexing.search(asked)[0]
    assert best.id == shards.key(4) and best.score == pytest.approx(1, abs=1e-5)
    assert best.info["caption"] == shards.info(4)["captions"][0]
    kept = pictures_of(told.index)
    assert kept is not None and all(kept.get(key) for key in shards.keys)


def test_text_and_image_together_ask_for_the_middle(exports, embedder, pictures, tmp_path):
    (tmp_path / "query.png").write_bytes(pictures[4])
    text, image = embedder.texts(["a red circle"])[0], embedder.images(pictures[4:5])[0]
    both = indexing.query(embedder, "a red circle", tmp_path / "query.png")
    assert np.allclose(both[0], (text + image) / np.linalg.norm(text + image), atol=1e-5)


def test_building_again_adds_nothing_and_mends_what_changed(told, monkeypatch):
    indexing.build(told)
    added = []

    def watched(*place, **how):
        index = open_index(*place, **how)
        add = index.add
        monkeypatch.setattr(index, "add", lambda ids, *rest: (added.append(ids), add(ids, *rest)))
        return index

    monkeypatch.setattr(indexing, "open_index", watched)
    assert indexing.build(told)["images"] == 12 and added == []
    index = open_index(told.index)
    one = index.get([index.search(np.ones((1, 16)) / 4, 1)[0][0].id])[0]
    index.add([one.id], one.vector[None], [{"caption": "changed"}])
    index.close()
    assert indexing.build(told)["images"] == 12 and added == [[one.id]]


def test_a_picture_is_the_one_whose_vector_is_kept(told, exports, pictures, tmp_path):
    """Built again over records of the same keys with other pictures."""
    for name, shown in (("old/made/data", pictures[0]), ("new/made/data", pictures[1])):
        with ShardWriter(tmp_path / name) as writer:
            writer.write(Record(key="r", images=(shown,), info={}))
            writer.write(Record(key="same", images=(pictures[2],), info={}))
    kept = pictures_of(told.index)
    build = replace(told, embedded=None, export=str(exports["towers"]), data=str(tmp_path / "old/made/data"))
    indexing.build(build)
    written = {path: path.stat().st_mtime_ns for path in kept.folder.rglob("*") if path.is_file()}
    assert kept.get("r") == thumbnail(pictures[0]) and len(written) == 2
    indexing.build(replace(build, data=str(tmp_path / "new/made/data")))
    assert kept.get("r") == thumbnail(pictures[1])
    again = {path: path.stat().st_mtime_ns for path in kept.folder.rglob("*") if path.is_file()}
    assert sum(again[path] == written[path] for path in written) == 1, "of what did not change it is left"
    indexing.build(replace(build, images="none"))
    assert kept.get("r") is None and kept.get("same") == thumbnail(pictures[2])


def test_what_damaged_shards_lost_is_named(told, exports, pictures, tmp_path):
    with ShardWriter(tmp_path / "data") as writer:
        for i, shown in enumerate([pictures[0], pictures[1][:99], pictures[2]]):
            writer.write(Record(key=f"r{i}", images=(shown,), info={}))
    (tar,) = (tmp_path / "data").glob("*.tar")
    tar.write_bytes(tar.read_bytes()[: -len(pictures[2]) - 1024])
    build = replace(told, embedded=None, export=str(exports["towers"]), data=str(tmp_path / "data"))
    done = indexing.build(build)
    lost = {one.key for one in Shards(build.data).damage}
    assert lost and done["images"] == 1 and {one.key for one in done["dropped"]} == {*lost, "r1"}
    embed(Embed(export=build.export, data=build.data, out=tmp_path / "vectors"))
    from_vectors = replace(told, embedded=tmp_path / "vectors")
    for images in ("keep", "none"):
        again = indexing.build(replace(from_vectors, images=images))
        assert sorted(map(str, again["dropped"])) == sorted(map(str, done["dropped"]))
    (tmp_path / "vectors" / "dropped.jsonl").unlink()
    with pytest.raises(UserError, match="run `vlp embed` again"):
        indexing.build(from_vectors)


def test_data_sets_share_an_index_by_prefixes(told, exports, world):
    indexing.build(replace(told, prefix="test/"))
    from_export = replace(told, embedded=None, export=str(exports["towers"]), data=str(world / "val"), prefix="val/")
    assert indexing.build(from_export)["images"] == 16
    index = open_index(told.index)
    assert {hit.id.split("/")[0] for hit in index.search(np.ones((1, 16)) / 4, 16)[0]} == {"test", "val"}
    index.close()


def test_filters_on_the_command_line_take_a_number_for_either(told, exports, pictures, tmp_path):
    with ShardWriter(tmp_path / "labelled") as writer:
        for i, picture in enumerate(pictures[:4]):
            writer.write(Record(key=f"r{i}", images=(picture,), info={"label": i if i < 2 else f"{i}"}))
    build = replace(told, embedded=None, export=str(exports["towers"]), data=str(tmp_path / "labelled"), images="none")
    indexing.build(build)
    asked = IndexSearch(index=told.index, export=str(exports["towers"]), text="a red circle")
    for i in range(4):
        assert [hit.id for hit in indexing.search(replace(asked, where=(f"label={i}",)))] == [f"r{i}"]
    with pytest.raises(UserError, match="FIELD=VALUE"):
        indexing.search(replace(asked, where=("label",)))


def test_another_model_s_vectors_are_refused(told, exports):
    indexing.build(told)
    asked = IndexSearch(index=told.index, export=str(exports["all"]), text="a red circle")
    with pytest.raises(UserError, match="vectors of another model, towers"):
        indexing.search(asked)


def test_an_index_by_url_needs_a_folder_for_pictures(told):
    with pytest.raises(UserError, match="say with --pictures"):
        indexing.build(replace(told, index="http://127.0.0.1:9/x"))


def test_pictures_of_other_shards_are_not_taken_for_them(told, world, tmp_path):
    data = shutil.copytree(world / "val", tmp_path / "moved")
    done = indexing.build(replace(told, data=str(data)))
    assert done["images"] == len(done["dropped"]) == 12 and "another record in its place" in done["dropped"][0].reason


def test_commands_from_run_to_search(runs, world, tmp_path, capsys):
    place = {name: str(tmp_path / name) for name in ("export", "vectors", "index")}
    assert main(["export", str(runs["towers"]), place["export"]]) == 0
    assert main(["embed", place["export"], str(world / "test"), place["vectors"]]) == 0
    assert main(["index", "build", place["index"], place["vectors"]]) == 0
    asked = ["--text", "a red circle", "--k", "2"]
    assert main(["index", "search", place["index"], "--export", place["export"], *asked]) == 0
    told = capsys.readouterr().out
    for words in ("towers can embed", "12 images, 24 texts", f"{place['index']}: 12 images", "scene-test-"):
        assert words in told
    assert main(["index", "search", place["index"], "--export", place["export"]]) == 2
    assert "give --text, --image, or both" in capsys.readouterr().err
