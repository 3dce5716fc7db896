"""Public encoders answer questions and write captions, from a conversion and from a run that started from them."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastvlp.cli import main
from fastvlp.convert.checkpoints import convert
from fastvlp.data.world.corpus import WorldConfig, write_world
from fastvlp.model.saving import load_model
from fastvlp.tasks.decoder import DecoderConfig
from fastvlp.tasks.task_evaluation import evaluate_task
from tests.tasks.tuning import tune
from tests.towers.public import write_public


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("public")
    write_world(folder / "world", WorldConfig(size=32, captions=2), train=16, val=4, test=4, pairs=0, singles=0)
    for name in ("clip", "siglip", "vit"):
        convert(write_public(name, folder / f"public-{name}"), folder / name)
    return folder


def trained(folder: Path, image: str, text: str) -> Path:
    """A run of clip that starts from two public encoders."""
    world, out = folder / "world", folder / f"{image}-{text}"
    options = (
        f"--data.train {world / 'train'} --data.val {world / 'val'} --data.batch-size 8 --precision fp32 --steps 1"
    )
    encoders = f"--image {write_public(image, folder / image)} --text {write_public(text, folder / text)}"
    assert (
        main(["pretrain", "clip_photos", "--out", str(out), "--budget-s", "None", *f"{options} {encoders}".split()])
        == 0
    )
    return out


@pytest.mark.slow
@pytest.mark.parametrize("source", ["clip", "siglip", "resnet-mpnet", "brivl"])
def test_two_public_encoders_are_tuned(folder, tmp_path, source):
    start = folder / source
    if source == "resnet-mpnet":
        start = trained(folder, "resnet", "mpnet")
    elif source == "brivl":
        start = tmp_path / "brivl"
        world = folder / "world"
        words = f"pretrain brivl_demo --out {start} --data.train {world / 'train'} --data.val {world / 'val'} --steps 1"
        assert main([*words.split(), "--data.batch-size", "8", "--budget-s", "None"]) == 0
    small = DecoderConfig(text="new", layers=1, image_layers=1, width=32)
    for task, options in (("vqa", {}), ("caption", {"decoder": small, "freeze": ("image",)})):
        scores, _ = tune(task, start, folder / "world", tmp_path / task, **options)
        assert evaluate_task(tmp_path / task).scores == {"test": scores["test"]}
        assert load_model(tmp_path / task).model.config.image == load_model(start).model.config.image


@pytest.mark.slow
def test_an_image_encoder_alone_writes_captions(folder, tmp_path):
    """It has no words: they are those of the captions."""
    small = DecoderConfig(text="new", layers=1, image_layers=1, width=32)
    tune("caption", folder / "vit", folder / "world", tmp_path / "run", decoder=small)
    assert load_model(tmp_path / "run").tokenizer.vocab_size > 50
