"""A recipe starts from any saved model: with its encoders, whatever their size, and the recipe's parts around them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastvlp.cli import main
from fastvlp.data.tokenize import Tokenizer
from fastvlp.errors import UserError
from fastvlp.files import write_whole
from fastvlp.model import sizes
from fastvlp.model.encoders.absent_encoders import AbsentImagesConfig, AbsentTextsConfig
from fastvlp.model.inherited_config import inherited_config, with_width
from fastvlp.model.layers import LayerConfig
from fastvlp.model.model import ModelConfig, VLModel
from fastvlp.model.saving import load_model, save_model
from fastvlp.recipes import recipe
from tests.training.runs import made_pairs

SHORT = ["--budget-s", "None", "--steps", "1", "--threads", "1", "--data.workers", "0", "--data.batch-size", "4"]


def other_towers() -> ModelConfig:
    """Two encoders that no recipe has: 40 wide for images, 48 for texts."""
    config = sizes.clip(
        sizes.Tower(1, 40, 2), sizes.Tower(2, 48, 3), width=24, size=32, patch=16, positions=20, activation="quick_gelu"
    )
    return replace(config, embed=replace(config.embed, text_mask="full"))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    return made_pairs(tmp_path_factory.mktemp("pairs"))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["a red box beside a large blue ball"] * 3, vocab_size=80)


def saved(folder: Path, config: ModelConfig, tokenizer: Tokenizer, **info) -> Path:
    torch.manual_seed(1)
    model = VLModel(sizes.with_tokenizer(config, tokenizer))
    save_model(folder, model, tokenizer, {"name": folder.name, "reading": "full", "step": 0, **info})
    data = {"fit": "squash", "max_length": 20, "captions": "captions"}
    write_whole(folder / "config.json", json.dumps({"name": folder.name, "data": data}).encode())
    return folder


def started(recipe: str, folder: Path, pairs: Path, out: Path, *more: str) -> tuple[dict, ModelConfig]:
    """Returns the line of a run's log about its weights, and its model."""
    places = ["--data.train", f"{pairs}/train", "--data.val", "None", "--out", str(out)]
    assert main(["pretrain", recipe, "--from", str(folder), *SHORT, *places, *more]) == 0
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return next(line for line in lines if line["kind"] == "inherited"), load_model(out).model.config


@pytest.mark.parametrize("name", ["clip_photos", "flm_photos", "brivl_photos"])
def test_recipes_take_encoders_of_any_size(name: str, tmp_path: Path, pairs: Path, tokenizer: Tokenizer):
    folder = saved(tmp_path / "saved", other_towers(), tokenizer)
    began, config = started(name, folder, pairs, tmp_path / "run")
    wanted = load_model(folder).model.config
    assert config.image == wanted.image and config.text == wanted.text
    run = json.loads((tmp_path / "run" / "config.json").read_text())
    assert run["data"]["fit"] == "squash" and run["data"]["max_length"] == 20
    parts = {kind: {part.split(".")[0] for part in began[kind]} for kind in ("fresh", "dropped")}
    # The head of the images reads regions in brivl_photos, and that of the texts has layers of its own.
    new = {"flm_photos": {"fusion", "head", "reconstructor"}, "clip_photos": {"objectives"}}
    assert parts["fresh"] == new.get(name, {"embed"})
    assert parts["dropped"] == ({"embed"} if name == "flm_photos" else set())
    assert any(part.startswith("image.blocks") for part in began["loaded"])
    assert any(part.startswith("text.blocks") for part in began["loaded"])


def test_a_single_stream_is_not_made_of_two_encoders():
    with pytest.raises(UserError, match="one stream over words and regions"):
        inherited_config(other_towers(), recipe("uniter_demo").model)
    with pytest.raises(UserError, match="one stream over words and regions"):
        inherited_config(recipe("uniter_demo").model, recipe("clip_photos").model)


def test_the_same_encoders_keep_the_recipes_image_size_and_positions():
    like = recipe("clip_photos").model
    short = replace(like, image=replace(like.image, size=64), text=replace(like.text, positions=32))
    assert inherited_config(short, like) == like
    other = replace(like.image, layer=replace(like.image.layer, activation="quick_gelu"))
    assert inherited_config(replace(short, image=other), like).image == other


def test_an_encoder_that_is_absent_is_the_recipes(tmp_path: Path, pairs: Path, tokenizer: Tokenizer):
    towers = other_towers()
    images = replace(towers, text=AbsentTextsConfig(positions=50, width=48))
    folder = saved(tmp_path / "images", images, tokenizer, untrained=["embed."])
    began, config = started("clip_photos", folder, pairs, tmp_path / "run", "--vocab", "90")
    assert config.image == towers.image and config.text.width == recipe("clip_photos").model.text.width
    assert config.text.vocab != tokenizer.vocab_size
    assert {part.split(".")[0] for part in began["fresh"]} == {"text", "embed", "objectives"}
    texts = replace(towers, image=AbsentImagesConfig(size=32, width=40))
    folder = saved(tmp_path / "texts", texts, tokenizer, untrained=["embed."])
    began, config = started("clip_photos", folder, pairs, tmp_path / "run2")
    assert config.text == load_model(folder).model.config.text
    assert config.embed.text_mask == "full" and config.image == recipe("clip_photos").model.image
    assert all(part.startswith("text.") for part in began["loaded"])
    with pytest.raises(UserError, match="no image encoder"):
        load_model(folder).model.encode_image(torch.zeros(1, 3, 32, 32))


def test_a_layer_of_another_width_keeps_its_proportions():
    layer = LayerConfig(width=192, heads=6, hidden=768)
    wide = with_width(layer, 768)
    assert (wide.heads, wide.hidden) == (12, 3072)
    assert with_width(layer, 192) is layer
    odd = with_width(layer, 100)
    assert 100 % odd.heads == 0 and odd.hidden == 400
