"""Building an index and searching it: items are found, pictures are stored, and building again changes nothing."""

import io
import shutil
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from fastvlp.batch import Record
from fastvlp.cli import main
from fastvlp.data.records.shards import Shards, ShardWriter
from fastvlp.errors import UserError
from fastvlp.search import indexing
from fastvlp.search.bulk import embed_shards
from fastvlp.search.engines.chroma import ChromaIndex
from fastvlp.search.engines.interface import Hit, open_index, pictures_of
from fastvlp.search.indexing import Built, build_index, hits_table, parse_conditions, search_index
from fastvlp.search.thumbnails import thumbnail
from tests.installed import skip_without

skip_without("chromadb", install="-e '.[serve]'")


@pytest.fixture(scope="session")
def embedded(exports, world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("embedded") / "test"
    embed_shards(exports["towers"], world / "test", folder, per_part=5)
    return folder


@pytest.fixture
def arguments(embedded, tmp_path) -> dict[str, Any]:
    """Arguments of a build from embedded vectors."""
    return {"index": str(tmp_path / "index"), "embedded": embedded}


@pytest.fixture
def from_export(exports, tmp_path) -> dict[str, Any]:
    """Arguments of a build that embeds; `data` is missing."""
    return {"index": str(tmp_path / "index"), "export": str(exports["towers"])}


def build(arguments: Mapping[str, Any], **changes: Any) -> Built:
    options = {**arguments, **changes}
    return build_index(options.pop("index"), options.pop("embedded", None), **options)


def test_a_picture_finds_itself(arguments, exports, shards, pictures, tmp_path):
    assert build(arguments) == (arguments["index"], 12, [], 1.0)
    (tmp_path / "query.png").write_bytes(pictures[4])
    best = search_index(arguments["index"], export=exports["towers"], image=tmp_path / "query.png", k=3)[0]
    assert best.id == shards.key(4) and best.score == pytest.approx(1, abs=1e-5)
    assert best.info["caption"] == shards.info(4)["captions"][0]
    kept = pictures_of(arguments["index"])
    assert kept is not None and all(kept.get(key) for key in shards.keys)


def test_recall_is_the_share_of_the_nearest_that_are_found(arguments, monkeypatch, capsys):
    search = ChromaIndex._search

    def half(self, vectors, k, offset, where):
        """Every second of the nearest items is missed."""
        return [hits[::2] for hits in search(self, vectors, 2 * k, offset, where)]

    monkeypatch.setattr(ChromaIndex, "_search", half)
    assert build(arguments).recall == pytest.approx(0.5)
    command = ["index", "build", arguments["index"], str(arguments["embedded"])]
    assert main(command) == 0 and "recall@10 0.500" in capsys.readouterr().out


def test_text_and_image_together_search_by_their_mean(exports, embedder, pictures, tmp_path):
    (tmp_path / "query.png").write_bytes(pictures[4])
    text, image = embedder.texts(["a red circle"])[0], embedder.images(pictures[4:5])[0]
    both = indexing.query_vector(embedder, "a red circle", tmp_path / "query.png")
    assert np.allclose(both[0], (text + image) / np.linalg.norm(text + image), atol=1e-5)


def test_building_again_adds_only_what_changed(arguments, monkeypatch):
    build(arguments)
    added = []

    def watched(*place, **how):
        index = open_index(*place, **how)
        add = index.add
        monkeypatch.setattr(index, "add", lambda ids, *rest: (added.append(ids), add(ids, *rest)))
        return index

    monkeypatch.setattr(indexing, "open_index", watched)
    assert build(arguments).images == 12 and added == []
    index = open_index(arguments["index"])
    one = index.get([index.search(np.ones((1, 16)) / 4, 1)[0][0].id])[0]
    index.add([one.id], one.vector[None], [{"caption": "changed"}])
    index.close()
    assert build(arguments).images == 12 and added == [[one.id]]


def test_pictures_change_together_with_vectors(from_export, pictures, tmp_path):
    """Built again over records of the same keys with other pictures."""
    for name, shown in (("old/made/data", pictures[0]), ("new/made/data", pictures[1])):
        with ShardWriter(tmp_path / name) as writer:
            writer.write(Record(key="r", images=(shown,), info={}))
            writer.write(Record(key="same", images=(pictures[2],), info={}))
    kept = pictures_of(from_export["index"])
    build(from_export, data=str(tmp_path / "old/made/data"))
    written = {path: path.stat().st_mtime_ns for path in kept.folder.rglob("*") if path.is_file()}
    assert kept.get("r") == thumbnail(pictures[0]) and len(written) == 2
    build(from_export, data=str(tmp_path / "new/made/data"))
    assert kept.get("r") == thumbnail(pictures[1])
    again = {path: path.stat().st_mtime_ns for path in kept.folder.rglob("*") if path.is_file()}
    assert sum(again[path] == written[path] for path in written) == 1, "of what did not change it is left"
    build(from_export, data=str(tmp_path / "old/made/data"), images="none")
    assert kept.get("r") is None and kept.get("same") == thumbnail(pictures[2])


def test_records_lost_in_damaged_shards_are_named(arguments, from_export, pictures, tmp_path):
    with ShardWriter(tmp_path / "data") as writer:
        for i, shown in enumerate([pictures[0], pictures[1][:99], pictures[2]]):
            writer.write(Record(key=f"r{i}", images=(shown,), info={}))
    (tar,) = (tmp_path / "data").glob("*.tar")
    tar.write_bytes(tar.read_bytes()[: -len(pictures[2]) - 1024])
    built = build(from_export, data=str(tmp_path / "data"))
    lost = {record.key for record in Shards(tmp_path / "data").damage}
    assert lost and built.images == 1 and {record.key for record in built.dropped} == {*lost, "r1"}
    embed_shards(from_export["export"], tmp_path / "data", tmp_path / "vectors")
    from_vectors = arguments | {"embedded": tmp_path / "vectors"}
    for images in ("keep", "none"):
        again = build(from_vectors, images=images)
        assert sorted(map(str, again.dropped)) == sorted(map(str, built.dropped))
    (tmp_path / "vectors" / "dropped.jsonl").unlink()
    with pytest.raises(UserError, match="run `vlp embed` again"):
        build(from_vectors)


def test_prefixes_let_data_sets_share_an_index(arguments, from_export, world):
    build(arguments, prefix="test/")
    assert build(from_export, data=str(world / "val"), prefix="val/").images == 16
    index = open_index(arguments["index"])
    assert {hit.id.split("/")[0] for hit in index.search(np.ones((1, 16)) / 4, 16)[0]} == {"test", "val"}
    index.close()


def test_numbers_on_the_command_line_match_texts_and_numbers(from_export, pictures, tmp_path, capsys):
    with ShardWriter(tmp_path / "labelled") as writer:
        for i, picture in enumerate(pictures[:4]):
            writer.write(Record(key=f"r{i}", images=(picture,), info={"label": i if i < 2 else f"{i}"}))
    build(from_export, data=str(tmp_path / "labelled"), images="none")
    index, export = from_export["index"], from_export["export"]
    for i in range(4):
        where = parse_conditions([f"label={i}"])
        hits = search_index(index, export=export, text="a red circle", where=where)
        assert [hit.id for hit in hits] == [f"r{i}"]
    assert main(["index", "search", index, "--export", export, "--text", "a", "--where", "label=0"]) == 0
    output = capsys.readouterr().out
    assert "r0" in output and "r1" not in output
    with pytest.raises(UserError, match="FIELD=VALUE"):
        parse_conditions(["label"])
    assert main(["index", "search", index, "--export", export, "--text", "a", "--where", "label"]) == 2


def test_a_search_says_what_of_the_query_it_could_not_use(arguments, exports, capsys):
    build(arguments)
    index, export = arguments["index"], str(exports["towers"])
    assert search_index(index, export=export, text="a red circle").notes == []
    odd = search_index(index, export=export, text="a rqzvx circle", where={"colour": "red"})
    words, fields = odd.notes
    assert odd == [] and "rqzvx" in words and "circle" not in words
    assert "colour" in fields and "caption" in fields
    # A field that images have, and a value that none has, is a filter like any other.
    assert search_index(index, export=export, text="a red circle", where={"caption": "none"}).notes == []
    long = search_index(index, export=export, text="a red circle " * 40)
    assert long and "red circle" in long.notes[0]
    assert main(["index", "search", index, "--export", export, "--text", "rqzvx"]) == 0
    assert "rqzvx" in capsys.readouterr().out


def test_an_index_of_another_model_is_refused(arguments, exports):
    build(arguments)
    with pytest.raises(UserError, match="vectors of another model, towers"):
        search_index(arguments["index"], export=exports["all"], text="a red circle")


def test_an_index_on_a_server_needs_a_folder_for_pictures(arguments):
    with pytest.raises(UserError, match="`pictures`"):
        build(arguments, index="http://127.0.0.1:9/x")


def test_pictures_of_other_shards_are_not_stored(arguments, world, tmp_path):
    data = shutil.copytree(world / "val", tmp_path / "moved")
    built = build(arguments, data=str(data))
    assert built.images == len(built.dropped) == 12 and "another record in its place" in built.dropped[0].reason


def test_commands_from_run_to_search(runs, world, tmp_path, capsys):
    place = {name: str(tmp_path / name) for name in ("export", "vectors", "index")}
    assert main(["export", str(runs["towers"]), place["export"]]) == 0
    assert main(["embed", place["export"], str(world / "test"), place["vectors"]]) == 0
    assert main(["index", "build", place["index"], place["vectors"]]) == 0
    query = ["--text", "a red circle", "--k", "2"]
    assert main(["index", "search", place["index"], "--export", place["export"], *query]) == 0
    output = capsys.readouterr().out
    for words in ("towers can embed", "12 images, 24 texts", f"{place['index']}: 12 images", "scene-test-"):
        assert words in output
    assert main(["index", "search", place["index"], "--export", place["export"]]) == 2
    assert "give --text, --image, or both" in capsys.readouterr().err


@pytest.mark.parametrize("width", [60, 80, 200])
def test_a_caption_is_one_line_of_a_table(width):
    long = "a [red] circle\nbeside " + "a very long caption " * 30
    hits = [Hit(f"photos/{i:05d}", 0.12345, {"caption": long, "source": "s" * 100}) for i in range(3)]
    console = Console(width=width, file=io.StringIO())
    console.print(hits_table(hits))
    lines = console.file.getvalue().splitlines()
    assert len(lines) == 2 + 3 and all(len(line) <= width for line in lines)
    for i, line in enumerate(lines[2:]):
        assert f"photos/{i:05d}" in line and "0.123" in line and "a [red" in line and "…" in line
