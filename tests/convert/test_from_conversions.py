"""Uses of a conversion: recipes start from it whatever its encoders are, and it is evaluated, fine-tuned and exported."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from fastvlp.cli import main
from fastvlp.data.records.shards import ShardWriter
from fastvlp.data.world.corpus import WorldConfig, write_world
from fastvlp.model.saved_run import read_saved_run
from fastvlp.model.saving import load_model
from tests.convert import test_brivl, test_checkpoints
from tests.convert.public_models import write_model
from tests.training.runs import made_records

SHORT = ["--budget-s", "None", "--steps", "1", "--threads", "1", "--data.workers", "0", "--data.batch-size", "4"]
# Name -> the recipe whose run starts from it, and the parts that are then new.
STARTS: dict[str, list[tuple[str, set[str]]]] = {
    "clip": [("clip_photos", set()), ("flm_photos", {"fusion", "head", "reconstructor"}), ("brivl_photos", {"embed"})],
    "siglip": [("siglip_photos", set()), ("clip_photos", {"objectives"})],
    "chinese_clip": [("moco_photos", set())],
    "vit_roberta": [("flip_photos", set()), ("mlm_photos", {"fusion", "head"})],
    "vit": [("clip_photos", {"text", "embed", "objectives"})],
    "bert": [("clip_photos", {"image", "embed", "objectives"}), ("ar_photos", {"image", "fusion", "head"})],
    "convnext": [("flm_photos", {"text", "fusion", "head", "reconstructor"})],
    "brivl2": [("brivl_photos", {"image", "embed"})],
}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    write_world(folder, WorldConfig(size=32, captions=2), train=24, val=8, test=8, pairs=0, singles=0)
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Folder of a conversion by name; each is made once."""
    folders: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in folders:
            place = tmp_path_factory.mktemp(name)
            if name == "brivl2":
                test_brivl.converted(place, "--layout", "brivl2")
            else:
                assert main(["convert", str(write_model(name, place / "public").folder), str(place / "out")]) == 0
            folders[name] = place / "out"
        return folders[name]

    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("name", "recipe", "new"), [(n, *start) for n, starts in STARTS.items() for start in starts])
def test_a_recipe_starts_from_it(name: str, recipe: str, new: set[str], made, world: Path, tmp_path: Path):
    source, out = made(name), tmp_path / "run"
    places = ["--data.train", f"{world}/train", "--data.val", "None", "--out", str(out), "--vocab", "120"]
    assert main(["pretrain", recipe, "--from", str(source), *SHORT, *places]) == 0
    saved, config = load_model(source).model.config, load_model(out).model.config
    for part in ("image", "text"):
        if getattr(saved, part).present:
            assert getattr(config, part) == getattr(saved, part)
    lines = map(json.loads, (out / "log.jsonl").read_text().splitlines())
    began = next(line for line in lines if line["kind"] == "inherited")
    assert {part.split(".")[0] for part in began["fresh"]} == new
    if (recipe, new) != STARTS[name][-1]:
        return
    # It is a run like any other: another starts from it.
    again = ["--data.train", f"{world}/train", "--data.val", "None", "--out", str(tmp_path / "again")]
    assert main(["pretrain", recipe, "--from", str(out), *SHORT, *again]) == 0


@pytest.mark.parametrize("name", ["clip", "siglip", "chinese_clip", "vit_roberta"])
def test_two_encoders_are_evaluated_and_exported(name: str, made, world: Path, tmp_path: Path):
    source = str(made(name))
    data = read_saved_run(source).data
    assert {"fit", "max_length", "captions"} <= data.stated
    assert main(["evaluate", "retrieval", source, "--data", str(world), "--split", "val"]) == 0
    assert main(["export", source, str(tmp_path / "export")]) == 0


def test_an_image_encoder_alone_is_probed(made, world: Path, tmp_path: Path, capsys):
    for split, seed in (("train", 0), ("test", 1)):
        with ShardWriter(tmp_path / split) as writer:
            for i, record in enumerate(made_records(20, seed)):
                writer.write(replace(record, info={"label": "even" if i % 2 else "odd"}))
    assert main(["evaluate", "probe", str(made("vit")), "--data", str(tmp_path)]) == 0
    assert main(["evaluate", "retrieval", str(made("vit")), "--data", str(world)]) == 2
    assert "error: " in capsys.readouterr().err


@pytest.mark.slow
def test_a_single_stream_is_fine_tuned(world: Path, tmp_path: Path):
    checkpoint, _ = test_checkpoints.uniter_checkpoint(tmp_path)
    assert main(["convert", str(checkpoint), str(tmp_path / "out"), "--heads", "2"]) == 0
    tune = ["--data", str(world), "--steps", "1", "--batch-size", "4", "--out", str(tmp_path / "tuned")]
    assert main(["finetune", "vqa", "--from", str(tmp_path / "out"), *tune]) == 0
