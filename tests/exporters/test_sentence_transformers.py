"""Runs in sentence-transformers: CLIP, SigLIP and Chinese CLIP, and encoders of any two public models with heads of ours."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastvlp.cli import main
from fastvlp.convert.public_encoders import read_images, read_texts, read_tokenizer
from fastvlp.convert.public_model import public_weights, with_encoders
from fastvlp.errors import UserError
from fastvlp.exporters.export import export
from fastvlp.model.model import VLModel
from fastvlp.model.saving import save_model
from fastvlp.model.sizes import brivl_tiny, clip_small, with_tokenizer
from tests.convert.public_models import write_model
from tests.exporters.made_runs import clip_shaped, made_run
from tests.installed import skip_without

skip_without("sentence_transformers", install="-e '.[sentence-transformers]'")


def exported(run: Path, out: Path) -> float:
    return max(export(run, out, to="sentence-transformers").differences.values())


def test_a_clip_shaped_run(tmp_path: Path):
    assert exported(made_run(tmp_path / "run", clip_shaped()), tmp_path / "out") <= 1e-5


@pytest.mark.parametrize("name", ["siglip", "chinese_clip"])
def test_public_models(name: str, tmp_path: Path):
    write_model(name, tmp_path / name)
    assert main(["convert", str(tmp_path / name), str(tmp_path / "run")]) == 0
    assert exported(tmp_path / "run", tmp_path / "out") <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("image", "text", "hidden"), [("vit", "bert", None), ("clip", "roberta", 20), ("dinov2", "electra", None)]
)
def test_two_public_encoders_with_heads_of_ours(image: str, text: str, hidden: int | None, tmp_path: Path):
    pictures = read_images(str(write_model(image, tmp_path / image).folder))
    words = read_texts(str(write_model(text, tmp_path / text).folder))
    config = with_encoders(clip_small(), pictures, words)
    head = replace(config.embed.image, hidden=hidden)
    tokenizer = read_tokenizer(words.folder)
    model = VLModel(with_tokenizer(replace(config, embed=replace(config.embed, image=head)), tokenizer))
    weights = model.resized(public_weights(model.config, pictures, words))
    own = model.state_dict()
    fits = {name: x for name, x in weights.items() if name in own and own[name].shape == x.shape}
    model.load_state_dict(own | fits)
    save_model(tmp_path / "run", model, tokenizer, {"name": "both", "objectives": {}}, objectives={})
    settings = '{"name": "both", "data": {"fit": "squash", "max_length": 12, "captions": "captions"}}'
    (tmp_path / "run" / "config.json").write_text(settings)
    assert exported(tmp_path / "run", tmp_path / "out") <= 1e-5


def test_heads_that_are_more_than_linear_maps_are_named(tmp_path: Path):
    torch.manual_seed(0)
    with pytest.raises(UserError, match="onnx"):
        export(made_run(tmp_path / "run", brivl_tiny(grid=3)), tmp_path / "out", to="sentence-transformers")
