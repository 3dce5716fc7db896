"""The published runs are of the published sizes, and start from public encoders of these sizes in the layout of transformers.

Numbers of parameters are in millions, of the released code or of the papers. The folders have no weights: none are needed to
count. `bench/published_sizes.py` trains a step of each run.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from fastvlp.model.model import ModelConfig, VLModel
from fastvlp.recipes import recipe
from fastvlp.training.public_start import with_public_encoders
from fastvlp.training.train_config import TrainConfig
from fastvlp.training.trained_parts import freeze

BENCH = Path(__file__).parents[1] / "bench"
PUBLIC = ("clip-vit-base-patch32", "roberta-base", "efficientnet-b5", "chinese-roberta-wwm-ext", "bert-base-cased")
RELATIVE = 5e-3
pytestmark = pytest.mark.skipif(not BENCH.exists(), reason="installed without its benchmarks")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("published")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCH)
        layouts = importlib.import_module("public_layouts")
    for name in PUBLIC:
        layouts.write_config(name, folder / name)
    return folder


def millions(*parts: nn.Module, trained: bool = False) -> float:
    return sum(p.numel() for part in parts for p in part.parameters() if p.requires_grad or not trained) / 1e6


def built(config: ModelConfig, vocab: int) -> VLModel:
    with torch.device("meta"):
        return VLModel(replace(config, text=replace(config.text, vocab=vocab)))


@pytest.fixture
def started(folder) -> Callable[..., TrainConfig]:
    """A recipe that starts from public encoders of the folder."""
    return lambda name, image, text: with_public_encoders(
        recipe(name),
        image=str(folder / image),
        image_layers=recipe(name).image_layers,
        text=str(folder / text),
        text_layers=recipe(name).text_layers,
    )


def test_flm_base(started):
    run = started("flm_base", "clip-vit-base-patch32", "roberta-base")
    assert run.model == recipe("flm_base").model, "CLIP at 288 pixels and RoBERTa, as our encoders"
    model = built(run.model, 50265)
    parts = {
        "image encoder": (millions(model.image), 80.4),
        "embedding and first layers": (millions(model.text), 39.0 + 42.5),
        "fusion layers": (millions(model.fusion.blocks), 56.7),
        "reconstructor": (millions(model.reconstructor), 85.1),
        "vocabulary head": (millions(model.head), 39.3),
        # Of the released code's transforms and pooler we have no pooler: pretraining does not use it.
        "all": (millions(model), 345 - 0.6),
    }
    for name, (ours, known) in parts.items():
        assert ours == pytest.approx(known, rel=RELATIVE), name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "size", "cells", "grid"),
    [("brivl_base", 380, 12, None), pytest.param("brivl2_base", 456, 15, 6, marks=pytest.mark.slow)],
)
def test_brivl(started, name, size, cells, grid):
    run = started(name, "efficientnet-b5", "chinese-roberta-wwm-ext")
    assert (run.model.image.size, run.model.image.grid) == (size, cells)
    assert (run.model.embed.image.regions.grid, run.data.regions is None) == (grid, grid is not None)
    assert run.model.embed == recipe(name).model.embed
    assert run.model.image.std == pytest.approx((0.229, 0.224, 0.225), abs=1e-6), (
        "stated as its root, and applied twice"
    )
    model = built(run.model, 21128)
    image, text = model.embed.image, model.embed.text
    parts = {
        "CNN": (millions(model.image), 28.34),
        # Without the pooler, of 0.59.
        "RoBERTa": (millions(model.text), 102.27 - 0.59),
        "attention over regions": (millions(image.blocks), 100.75),
        "convolution of regions": (millions(image.regions), 4.20),
        "MLP of images": (millions(image.hidden, image.out), 8.39),
        "attention over words": (millions(text.blocks), 22.06),
        "MLP of texts": (millions(text.hidden, text.out), 5.77),
        "all": (millions(model), 272.0),
    }
    for part, (ours, known) in parts.items():
        assert ours == pytest.approx(known, rel=RELATIVE), part
    freeze(model, run.freeze, run.train_last)
    assert millions(model.image, trained=True) == pytest.approx(26.83, rel=RELATIVE)
    trained = {name for name, p in model.text.named_parameters() if p.requires_grad}
    assert {".".join(name.split(".")[:2]) for name in trained} == {f"blocks.{i}" for i in range(8, 12)}


def test_uniter_base(folder):
    run = recipe("uniter_base")
    adapted = with_public_encoders(replace(run, init=None), text=str(folder / "bert-base-cased"))
    assert adapted.model == run.model
    model = built(run.model, 28996)
    with torch.device("meta"):
        heads = [run.objectives[name].build(run.model, None) for name in ("mrfr", "mrc_kl")]
    assert millions(model, *heads) == pytest.approx(112.94, rel=RELATIVE)
    assert millions(model.single.blocks) == pytest.approx(85.05, rel=RELATIVE)
    assert millions(model) - millions(model.single.words, model.single.match) == pytest.approx(109.90, rel=RELATIVE)
