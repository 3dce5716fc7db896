"""The map of a public CNN is read by BriVL (boxes or a grid), by UNITER (in place of a detector) and by FLM (as tokens)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fastvlp.cli import main
from fastvlp.data.world.corpus import WorldConfig, write_world
from fastvlp.model.saving import load_model
from fastvlp.training.checkpoint import load_checkpoint
from tests.towers.public import image_models, randomised, save, write_public

RUNS = {
    # The heads of the released size have 130 M parameters.
    "brivl_base": "--image efficientnet --text bert --model brivl_tiny --freeze --train-last.image 2 --train-last.text 1",
    "brivl2_base": "--image resnet --text bert --model brivl_tiny --freeze image --train-last.image None --train-last.text 0",
    "uniter_end2end": "--image efficientnet --text bert --freeze image",
    "flm_photos": "--image convnext --text roberta",
}
EVALUATED = {
    "brivl_base": "evaluate retrieval RUN --data WORLD --split test",
    "brivl2_base": "evaluate retrieval RUN --data WORLD --split test",
    "uniter_end2end": "evaluate task RUN --data WORLD --split test --zero-shot",
    "flm_photos": "finetune vqa --from RUN --data WORLD --steps 1 --out RUN-vqa",
}
PUBLIC = ("efficientnet", "resnet", "convnext", "bert", "roberta")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cnn")
    write_world(folder / "world", WorldConfig(size=48, captions=2), train=24, val=4, test=6, pairs=0, singles=0)
    for name in PUBLIC:
        write_public(name, folder / name)
    # As transformers draws them, the states of a CNN are all nearly zero.
    for name in ("efficientnet", "resnet", "convnext"):
        save(randomised(image_models()[name]), folder / name)
    return folder


def vlp(folder: Path, words: str, *more: str) -> None:
    own = [str(folder / word) if word in PUBLIC else word for word in words.split()]
    assert main([*own, *more]) == 0


def pretrain(folder: Path, name: str, out: Path, *more: str) -> None:
    world = folder / "world"
    fixed = (
        f"--data.train {world}/train --data.val {world}/val --data.batch-size 6 --data.workers 0 --data.max-length 24 "
        "--precision fp32 --device cpu --log-every 1 --threads 1 --budget-s None --validate-every None "
        "--optim.warmup 0 --optim.decay constant"
    )
    vlp(folder, f"pretrain {name} {RUNS[name]} {fixed} --out {out}", *more)


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(run / "last.pt")["pretraining"]


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_recipes_train_resume_are_evaluated_and_exported(name, folder, tmp_path, monkeypatch, capsys):
    pretrain(folder, name, tmp_path / "a", "--steps", "3")
    pretrain(folder, name, tmp_path / "b", "--steps", "2")
    pretrain(folder, name, tmp_path / "b", "--steps", "3", "--resume")
    straight, resumed = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert [key for key in straight if not torch.equal(straight[key], resumed[key])] == []
    lines = [json.loads(line) for line in (tmp_path / "a/log.jsonl").read_text().splitlines()]
    inherited = next(line for line in lines if line["kind"] == "inherited")
    assert not [key for key in inherited["fresh"] if key.startswith(("image.", "text."))]

    monkeypatch.setattr("fastvlp.convert.public_folder.open_public", None)
    config = load_model(tmp_path / "a").model.config
    assert (config.image.size, config.image.grid, config.image.prefix) == (64, 2, 0)
    said = EVALUATED[name].replace("RUN", str(tmp_path / "a")).replace("WORLD", str(folder / "world"))
    vlp(folder, said)
    export = ["export", str(tmp_path / "a"), str(tmp_path / "export")]
    if name in ("brivl_base", "uniter_end2end"):
        # Of a picture alone there are no boxes to serve it by.
        assert main(export) == 2 and "regions" in capsys.readouterr().err
        return
    assert main(export) == 0
    exported = load_model(tmp_path / "export").model.state_dict()
    own = load_model(tmp_path / "a").model.state_dict()
    assert own.keys() == exported.keys() and all(torch.equal(own[key], exported[key]) for key in own)


@pytest.mark.slow
def test_the_grid_of_a_frozen_cnn_is_computed_once_as_a_detectors_regions_are(folder, tmp_path):
    losses = {}
    for store in ("always", "never"):
        states = ("--states.store", store, "--states.dtype", "fp32", "--states.folder", str(tmp_path / "states"))
        pretrain(folder, "uniter_end2end", tmp_path / store, "--steps", "3", *states)
        lines = [json.loads(line) for line in (tmp_path / store / "log.jsonl").read_text().splitlines()]
        losses[store] = [line["loss"] for line in lines if line["kind"] in ("train", "validation")]
    assert len([*(tmp_path / "states").iterdir()]) == 2, "of train and of val"
    assert losses["always"] == pytest.approx(losses["never"], rel=1e-5)
