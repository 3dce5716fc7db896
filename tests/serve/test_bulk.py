"""Vectors of shards: each of its own record, whatever was dropped, however often the run was stopped, on any ranks."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest

from fastvlp.batch import Record
from fastvlp.data.records.shards import Shards, ShardWriter
from fastvlp.errors import UserError
from fastvlp.search.bulk import embed, open_embedded, read_part
from fastvlp.serve.options import Embed


@pytest.fixture
def told(exports, world, tmp_path):
    return Embed(export=str(exports["towers"]), data=str(world / "test"), out=tmp_path / "vectors", per_part=5)


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_rows_are_the_embedder_s_own(told, embedder, shards, pictures):
    done = embed(replace(told, captions=("captions", "captions_zh"), batch_size=2))
    assert done == {"images": 12, "texts": 48, "dropped": []}
    parts = [read_part(path) for path in open_embedded(told.out).parts]
    assert [len(part.ids) for part in parts] == [5, 5, 2]
    assert [id for part in parts for id in part.ids] == shards.keys
    assert np.allclose(np.concatenate([part.image for part in parts]), embedder.images(pictures), atol=1e-6)
    said = [text for part in parts for text in part.said]
    assert np.allclose(np.concatenate([part.text for part in parts]), embedder.texts(said), atol=1e-6)
    info = shards.info(7)
    assert [parts[1].said[t] for t in np.flatnonzero(parts[1].image_of_text == 2)] == info["captions"] + info[
        "captions_zh"
    ]
    assert parts[1].infos[2] == {
        "caption": info["captions"][0],
        "caption_zh": info["captions_zh"][0],
        "source": f"{told.data.split('/')[-2]}/test/{shards.key(7)}",
    }


def test_captions_of_joined_fields_are_stored_apart(told, shards):
    embed(replace(told, captions=("captions+captions_zh",)))
    info = shards.info(7)
    stored = read_part(next(path for path in open_embedded(told.out).parts if "00001" in path.name)).infos[2]
    assert stored["caption"] == info["captions"][0] and stored["caption_zh"] == info["captions_zh"][0]


def test_damaged_records_are_named_and_leave_the_others_in_place(told, embedder, pictures, tmp_path):
    with ShardWriter(tmp_path / "damaged") as writer:
        for i, picture in enumerate(pictures[:6]):
            writer.write(Record(key=f"r{i}", images=(picture[:99] if i in (1, 4) else picture,), info={"label": i}))
    done = embed(replace(told, data=str(tmp_path / "damaged"), per_part=2))
    assert (done["images"], done["texts"]) == (4, 0)
    assert [one.key for one in done["dropped"]] == ["r1", "r4"] and "damaged" in done["dropped"][0].reason
    assert [json.loads(line)["key"] for line in (told.out / "dropped.jsonl").read_text().splitlines()] == ["r1", "r4"]
    middle = read_part(told.out / "00001.safetensors")
    assert middle.ids == ["r2", "r3"] and middle.places == [2, 3] and [info["label"] for info in middle.infos] == [2, 3]
    assert np.allclose(middle.image, embedder.images(pictures[2:4]), atol=1e-6)


def test_parts_that_are_there_are_not_made_again(told):
    embed(told)
    whole = files(told.out)
    (told.out / "00001.safetensors").unlink()
    marked = told.out / "00000.safetensors"
    made = marked.stat().st_mtime_ns
    embed(told)
    assert files(told.out) == whole and marked.stat().st_mtime_ns == made


@pytest.mark.parametrize("change", ["captions", "precision", "export", "data"])
def test_another_run_s_parts_are_not_continued(told, exports, world, change):
    embed(told)
    other = {
        "captions": {"captions": ("captions_zh",)},
        "precision": {"precision": "bf16"},
        "export": {"export": str(exports["all"])},
        "data": {"data": str(world / "val")},
    }[change]
    with pytest.raises(UserError, match="holds parts of another run"):
        embed(replace(told, **other))


def test_what_is_not_whole_is_not_opened(told):
    embed(told)
    (told.out / "00002.safetensors").unlink()
    with pytest.raises(UserError, match="1 of 3 parts are not there yet"):
        open_embedded(told.out)
    (told.out / "00002.safetensors").write_bytes(b"junk")
    with pytest.raises(UserError, match=r"00002\.safetensors: damaged"):
        read_part(told.out / "00002.safetensors")
    with pytest.raises(UserError, match="a folder that `vlp embed` wrote"):
        open_embedded(told.out.parent)


def test_a_folder_of_other_safetensors_is_left_alone(told, exports):
    with pytest.raises(UserError, match="did not write"):
        embed(replace(told, out=exports["all"]))
    assert not (exports["all"] / "embedded.json").exists()


def command(told):
    return [
        *("embed", told.export, told.data, str(told.out), "--per-part", str(told.per_part), "--threads", "1"),
    ]


def test_a_killed_run_goes_on_to_what_an_unbroken_one_writes(told, world, tmp_path):
    told = replace(told, data=str(world / "train"), per_part=1)
    with subprocess.Popen([sys.executable, "-m", "fastvlp", *command(told)], stdout=subprocess.DEVNULL) as child:
        while child.poll() is None and not (told.out / "00003.safetensors").exists():
            time.sleep(0.001)
        child.kill()
    assert (told.out / "00003.safetensors").exists() and not (told.out / "dropped.jsonl").exists()
    embed(told)
    straight = replace(told, out=tmp_path / "straight")
    embed(straight)
    # What was cut short is overwritten, not read: names of temporary files are no parts.
    assert files(straight.out) == {name: data for name, data in files(told.out).items() if not name.endswith(".tmp")}
    assert len(Shards(told.data)) == sum(len(read_part(path).ids) for path in open_embedded(told.out).parts)


@pytest.mark.slow
def test_ranks_share_the_parts_and_write_what_one_would(told, tmp_path):
    embed(told)
    shared = replace(told, out=tmp_path / "shared")
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "fastvlp"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *launch, *command(shared)], env=environment, check=True, capture_output=True, text=True
    )
    assert done.stdout.count("12 images, 24 texts") == 1
    assert files(shared.out) == files(told.out)
