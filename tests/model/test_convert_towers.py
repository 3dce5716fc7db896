"""A start from public towers: every tensor of both lands, the rest is fresh, and a run inherits all of it."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fastvlp.convert.towers import join_towers
from fastvlp.convert.weight_files import find_file, read_weights
from fastvlp.data.tokenize import Tokenizer
from fastvlp.errors import UserError
from fastvlp.model.fusion import ReconstructorConfig
from fastvlp.model.layers import LayerConfig
from fastvlp.model.model import VLModel
from fastvlp.model.saving import inherit, load_model
from tests.golden import load
from tests.made import made_config

WORDS = [a + b + c for a, b, c in product("abcdefghij", repeat=3)]


def made_files(folder: Path):
    """CLIP and RoBERTa as the hub has them, at the known answers' size, and a tokenizer of as many words."""
    tokenizer = Tokenizer.train(WORDS, "wordpiece", vocab_size=100)
    tokenizer.save(folder / "tokenizer.json")
    for name in ("hf_clip", "hf_roberta"):
        save_file(load(name)[2], folder / f"{name}.safetensors")
    vit = LayerConfig(width=32, heads=4, hidden=64, activation="quick_gelu")
    text = LayerConfig(width=32, heads=4, hidden=64, norm="post")
    config = made_config()
    config = replace(
        config,
        image=replace(config.image, size=32, patch=8, depth=1, layer=vit, embed_norm=True, patch_bias=False),
        text=replace(config.text, positions=14, depth=2, layer=text, position_offset=2, pad_position=1),
        fusion=replace(config.fusion, layer=text),
        reconstructor=None,
    )
    return config, folder / "hf_clip.safetensors", folder / "hf_roberta.safetensors", folder / "tokenizer.json"


def test_towers_land_and_a_run_inherits_them(tmp_path: Path):
    config, clip, roberta, tokenizer = made_files(tmp_path)
    join_towers(config, clip, roberta, tokenizer, tmp_path / "start")
    saved = load_model(tmp_path / "start")
    weights = load("hf_clip")[2] | load("hf_roberta")[2]
    assert torch.equal(saved.model.image.class_token, weights["vision_model.embeddings.class_embedding"])
    assert torch.equal(saved.model.text.word.weight, weights["embeddings.word_embeddings.weight"])
    layer = config.fusion.layer
    larger = replace(
        saved.model.config,
        image=replace(saved.model.config.image, size=48),
        reconstructor=ReconstructorConfig(bottom=2, top=2, layer=layer),
    )
    model = VLModel(larger)
    became = inherit(model, saved.model.state_dict(), "start")
    assert became.resized == ["image.position"] and not became.dropped
    assert {name.split(".")[0] for name in became.fresh} == {"reconstructor"}


def test_another_tokenizer_is_named(tmp_path: Path):
    config, clip, roberta, tokenizer = made_files(tmp_path)
    Tokenizer.train(WORDS, "wordpiece", vocab_size=90).save(tokenizer)
    with pytest.raises(UserError, match=r"text\.word\.weight is .*the tokenizer the text tower's own"):
        join_towers(config, clip, roberta, tokenizer, tmp_path / "start")


def test_what_is_no_weights_file_is_named(tmp_path: Path):
    for name, content in (("bad.safetensors", b"no"), ("bad.bin", b"no")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=name):
            read_weights(tmp_path / name)
    with pytest.raises(UserError, match="no such file or folder"):
        find_file(str(tmp_path / "absent"), "model.safetensors")
    with pytest.raises(UserError, match=r"has no model\.safetensors"):
        find_file(str(tmp_path), "model.safetensors")
