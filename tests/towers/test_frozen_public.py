"""Public encoders that are frozen, tuned in their last layers, or by adapters, as the command line says it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fastvlp.cli import main
from fastvlp.data.world.corpus import WorldConfig, write_world
from fastvlp.model.saving import load_model
from tests.towers.public import write_public

PAIRS = {"ours": ("clip", "bert"), "transformers": ("resnet", "mpnet")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("frozen")
    write_world(folder / "world", WorldConfig(size=32, captions=2), train=16, val=4, test=4, pairs=0, singles=0)
    for name in {name for pair in PAIRS.values() for name in pair}:
        write_public(name, folder / name)
    return folder


def pretrain(folder: Path, pair: str, out: Path, *options: str) -> list[dict]:
    """The lines of the run's log."""
    world, (image, text) = folder / "world", PAIRS[pair]
    fixed = (
        f"--data.train {world / 'train'} --data.val {world / 'val'} --data.batch-size 8 --precision fp32 --device cpu "
        f"--image {folder / image} --text {folder / text} --budget-s None --threads 1 --log-every 1 --steps 4"
    )
    assert main(["pretrain", "clip_photos", "--out", str(out), *fixed.split(), *options]) == 0
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def losses(lines: list[dict]) -> list[float]:
    return [line["loss"] for line in lines if line["kind"] in ("train", "validation")]


def changed(folder: Path, pair: str, run: Path) -> set[str]:
    """Weights that differ from those of the run of a step that changes nothing."""
    if not (folder / pair).exists():
        pretrain(folder, pair, folder / pair, "--steps", "1", "--optim.lr", "1e-12", "--states.store", "never")
    before, after = (load_model(path, "last").model.state_dict() for path in (folder / pair, run))
    return {name for name, x in after.items() if (x - before[name]).abs().max() > 1e-9}


@pytest.mark.slow
@pytest.mark.parametrize("pair", PAIRS)
def test_frozen_encoders_are_computed_once(folder, tmp_path, pair):
    frozen = ("--freeze", "image", "text", "--states.dtype", "fp32")
    stored = pretrain(folder, pair, tmp_path / "stored", *frozen, "--states.folder", str(tmp_path / "states"))
    notes = [(line["what"], line["entries"]) for line in stored if line["kind"] == "states"]
    # Six captions of an image in four steps of eight: they are not worth it, the images are.
    assert dict(notes)["images"] and len([*(tmp_path / "states").iterdir()]) >= 2
    plain = pretrain(folder, pair, tmp_path / "plain", *frozen, "--states.store", "never")
    assert losses(stored) == pytest.approx(losses(plain), rel=1e-4)
    assert all(name.startswith("embed.") for name in changed(folder, pair, tmp_path / "stored"))


@pytest.mark.slow
@pytest.mark.parametrize("pair", PAIRS)
def test_the_last_layers_learn(folder, tmp_path, pair):
    options = ("--train-last.image", "1", "--train-last.text", "2", "--optim.layer-decay", "0.7")
    (sizes,) = [line["parts"] for line in pretrain(folder, pair, tmp_path, *options) if line["kind"] == "parameters"]
    assert all(0 < sizes[part]["trained"] < sizes[part]["parameters"] for part in ("image", "text"))
    names = changed(folder, pair, tmp_path)
    encoders = load_model(tmp_path).model.encoders()
    for part, count in (("image", 1), ("text", 2)):
        before, layers, _ = encoders[part].layer_names()
        own = {name.removeprefix(f"{part}.") for name in names if name.startswith(f"{part}.")}
        still = (*before, *layers[: len(layers) - count])
        assert any(name.startswith(f"{layers[-1]}.") for name in own)
        assert not [name for name in own if any(f"{name}.".startswith(f"{part}.") for part in still)]


@pytest.mark.slow
@pytest.mark.parametrize("pair", PAIRS)
def test_adapters_are_trained_and_merged(folder, tmp_path, pair):
    # A CNN of convolutions alone has no linear layer.
    parts = ("image", "text") if pair == "ours" else ("text",)
    pretrain(folder, pair, tmp_path, "--lora.rank", "2", "--lora.parts", *parts, "--optim.lr", "1e-2")
    names = changed(folder, pair, tmp_path)
    assert {name.partition(".")[0] for name in names} >= {*parts}
    model = load_model(tmp_path, "last").model
    linear = {f"{name}.weight" for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear)}
    assert {name for name in names if name.startswith(tuple(f"{part}." for part in parts))} <= linear
    assert sorted(path.name for path in (tmp_path / "last-adapters").iterdir()) == sorted(parts)
