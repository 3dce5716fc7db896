"""Vectors of shards belong to their records, with damaged records, stopped runs and several ranks."""

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastvlp.batch import Record
from fastvlp.data.records.shards import Shards, ShardWriter
from fastvlp.errors import UserError
from fastvlp.search.bulk import Counts, embed_shards
from fastvlp.search.embedded import open_embedded, read_part
from tests.processes import be_rank, free_port, run_command, start_command, start_processes


@pytest.fixture
def arguments(exports, world, tmp_path) -> dict[str, Any]:
    return {"export": exports["towers"], "data": world / "test", "out": tmp_path / "vectors", "per_part": 5}


def embed(arguments: Mapping[str, Any], **changes: Any) -> Counts:
    options = {**arguments, **changes}
    counts = embed_shards(options.pop("export"), options.pop("data"), options.pop("out"), **options)
    assert counts is not None
    return counts


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_rows_equal_the_embedders(arguments, embedder, shards, pictures, world):
    counts = embed(arguments, captions=("captions", "captions_zh"), batch_size=2)
    assert counts == (arguments["out"], 12, 48, [])
    parts = [read_part(path) for path in open_embedded(arguments["out"]).parts]
    assert [len(part.ids) for part in parts] == [5, 5, 2]
    assert [id for part in parts for id in part.ids] == shards.keys
    assert np.allclose(np.concatenate([part.image for part in parts]), embedder.images(pictures), atol=1e-6)
    captions = [text for part in parts for text in part.captions]
    assert np.allclose(np.concatenate([part.text for part in parts]), embedder.texts(captions), atol=1e-6)
    info = shards.info(7)
    assert [parts[1].captions[t] for t in np.flatnonzero(parts[1].image_of_text == 2)] == info["captions"] + info[
        "captions_zh"
    ]
    assert parts[1].infos[2] == {
        "caption": info["captions"][0],
        "caption_zh": info["captions_zh"][0],
        "source": f"{world.name}/test/{shards.key(7)}",
    }


def test_captions_of_joined_fields_are_stored_separately(arguments, shards):
    embed(arguments, captions=("captions+captions_zh",))
    info = shards.info(7)
    stored = read_part(next(path for path in open_embedded(arguments["out"]).parts if "00001" in path.name)).infos[2]
    assert stored["caption"] == info["captions"][0] and stored["caption_zh"] == info["captions_zh"][0]


def test_damaged_records_are_named_and_left_out(arguments, embedder, pictures, tmp_path):
    with ShardWriter(tmp_path / "damaged") as writer:
        for i, picture in enumerate(pictures[:6]):
            writer.write(Record(key=f"r{i}", images=(picture[:99] if i in (1, 4) else picture,), info={"label": i}))
    counts = embed(arguments, data=tmp_path / "damaged", per_part=2)
    assert (counts.images, counts.texts) == (4, 0)
    assert [record.key for record in counts.dropped] == ["r1", "r4"] and "damaged" in counts.dropped[0].reason
    assert [json.loads(line)["key"] for line in (arguments["out"] / "dropped.jsonl").read_text().splitlines()] == [
        "r1",
        "r4",
    ]
    middle = read_part(arguments["out"] / "00001.safetensors")
    assert (
        middle.ids == ["r2", "r3"] and middle.positions == [2, 3] and [info["label"] for info in middle.infos] == [2, 3]
    )
    assert np.allclose(middle.image, embedder.images(pictures[2:4]), atol=1e-6)


def test_existing_parts_are_not_written_again(arguments):
    embed(arguments)
    whole = files(arguments["out"])
    (arguments["out"] / "00001.safetensors").unlink()
    marked = arguments["out"] / "00000.safetensors"
    made = marked.stat().st_mtime_ns
    embed(arguments)
    assert files(arguments["out"]) == whole and marked.stat().st_mtime_ns == made


@pytest.mark.parametrize("change", ["captions", "precision", "export", "data"])
def test_parts_of_another_run_are_refused(arguments, exports, world, change):
    embed(arguments)
    other = {
        "captions": {"captions": ("captions_zh",)},
        "precision": {"precision": "bf16"},
        "export": {"export": exports["all"]},
        "data": {"data": world / "val"},
    }[change]
    with pytest.raises(UserError, match="holds parts of another run"):
        embed(arguments, **other)


def test_missing_and_damaged_parts_are_refused(arguments):
    embed(arguments)
    (arguments["out"] / "00002.safetensors").unlink()
    with pytest.raises(UserError, match="1 of 3 parts are not there yet"):
        open_embedded(arguments["out"])
    (arguments["out"] / "00002.safetensors").write_bytes(b"junk")
    with pytest.raises(UserError, match=r"00002\.safetensors: damaged"):
        read_part(arguments["out"] / "00002.safetensors")
    with pytest.raises(UserError, match="a folder that `vlp embed` wrote"):
        open_embedded(arguments["out"].parent)


def test_a_folder_with_other_safetensors_is_refused(arguments, exports):
    with pytest.raises(UserError, match="did not write"):
        embed(arguments, out=exports["all"])
    assert not (exports["all"] / "embedded.json").exists()


def command(arguments):
    places = [str(arguments[name]) for name in ("export", "data", "out")]
    return ["embed", *places, "--per-part", str(arguments["per_part"]), "--threads", "1"]


@pytest.mark.slow
def test_a_killed_run_continues_to_the_same_files(arguments, world, tmp_path):
    arguments |= {"data": world / "train", "per_part": 1}
    out = arguments["out"]
    child = start_command(command(arguments), tmp_path / "printed.txt")
    while child.is_alive() and not (out / "00003.safetensors").exists():
        time.sleep(0.001)
    child.kill()
    child.join()
    assert (out / "00003.safetensors").exists() and not (out / "dropped.jsonl").exists()
    embed(arguments)
    embed(arguments, out=tmp_path / "straight")
    # What was cut short is overwritten, not read: names of temporary files are no parts.
    whole = {name: data for name, data in files(out).items() if not name.endswith(".tmp")}
    assert files(tmp_path / "straight") == whole
    assert len(Shards(world / "train")) == sum(len(read_part(path).ids) for path in open_embedded(out).parts)


@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_share_what_is_missing_whoever_wrote_the_rest(arguments, rank, monkeypatch):
    arguments |= {"per_part": 2}
    embed(arguments)
    for gone in (1, 3, 5):
        (arguments["out"] / f"0000{gone}.safetensors").unlink()
    monkeypatch.setattr("fastvlp.dist.world", lambda: 2)
    monkeypatch.setattr("fastvlp.dist.rank", lambda: rank)
    monkeypatch.setattr("fastvlp.search.bulk._summary", lambda *_: None)
    embed_shards(arguments["export"], arguments["data"], arguments["out"], per_part=2)
    left = [gone for gone in (1, 3, 5) if not (arguments["out"] / f"0000{gone}.safetensors").exists()]
    assert left == [[3], [1, 5]][rank]


def run_as_rank(rank: int, port: int, words: Sequence[str], folder: Path) -> None:
    be_rank(rank, 2, port)
    status, printed = run_command(words)
    assert status == 0, printed
    (folder / f"printed{rank}.txt").write_text(printed)


@pytest.mark.slow
def test_two_ranks_finish_what_one_began_and_write_what_it_would(arguments, tmp_path):
    arguments |= {"per_part": 2}
    embed(arguments)
    shared = arguments | {"out": tmp_path / "shared"}
    shutil.copytree(arguments["out"], shared["out"])
    # As a killed run of other ranks may leave it.
    (shared["out"] / "dropped.jsonl").unlink()
    for gone in (1, 3, 4, 5):
        (shared["out"] / f"0000{gone}.safetensors").unlink()
    start_processes(run_as_rank, (free_port(), command(shared), tmp_path), 2)
    printed = [(tmp_path / f"printed{rank}.txt").read_text() for rank in range(2)]
    assert [text.count("12 images, 24 texts") for text in printed] == [1, 0]
    assert files(shared["out"]) == files(arguments["out"])
