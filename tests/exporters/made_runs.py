"""Runs with random weights, as training saves them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch

from fastvlp.data.tokenize import Tokenizer
from fastvlp.model.model import ModelConfig, VLModel
from fastvlp.model.saving import save_model
from fastvlp.model.sizes import clip_small, with_tokenizer

CAPTIONS = ["a red circle and two blue squares", "a dog runs on the beach", "桌子上有两个红色的杯子", "小狗在沙滩上跑"]


def made_run(
    folder: Path, config: ModelConfig, *, fit: str = "crop", kind: Literal["wordpiece", "bpe"] = "wordpiece"
) -> Path:
    tokenizer = Tokenizer.train(CAPTIONS * 3, kind=kind, vocab_size=400)
    torch.manual_seed(0)
    model = VLModel(with_tokenizer(config, tokenizer))
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:  # norms and biases too
            torch.nn.init.normal_(parameter, 1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.1)
    info = {"name": "made", "objectives": {"clip": {"type": "CLIPConfig"}}, "step": 1}
    save_model(folder, model, tokenizer, info, objectives={"clip.log_scale": torch.tensor(1.5)})
    data = {"fit": fit, "max_length": 24, "captions": "captions"}
    (folder / "config.json").write_text(json.dumps({"name": "made", "data": data}))
    return folder


def with_one_layer(config: ModelConfig) -> ModelConfig:
    """A graph is traced operation by operation: each further layer takes as long as the first."""
    return replace(config, image=replace(config.image, depth=1), text=config.text.with_depth(1))


def clip_shaped() -> ModelConfig:
    config = clip_small(size=32)
    sizes = {"width": 32, "heads": 2, "hidden": 64}
    assert config.embed is not None
    return replace(
        config,
        image=replace(config.image, depth=2, layer=replace(config.image.layer, **sizes)),
        text=replace(config.text, depth=2, layer=replace(config.text.layer, **sizes)),
        embed=replace(config.embed, width=24),
    )
