"""An image encoder in a user's own file pretrains, resumes, is exported and is loaded, with no change to the package."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastvlp.cli import main
from fastvlp.data.world.corpus import WorldConfig, write_world
from fastvlp.errors import UserError
from fastvlp.extensions import import_file
from fastvlp.model.saving import load_model
from fastvlp.search.embedder import Embedder
from fastvlp.training.checkpoint import load_checkpoint
from tests.processes import in_new_process

ENCODER = """
from dataclasses import dataclass, replace

from torch import nn

from fastvlp.model.encoders.interface import ImageEncoder, ImageEncoderConfig
from fastvlp.model.sizes import brivl_tiny, fusion_model, two_towers
from fastvlp.recipes.brivl_demo import brivl_demo
from fastvlp.recipes.flip_demo import flip_demo
from fastvlp.recipes.flm_demo import flm_demo

SMALL = fusion_model(
    width=32, depths=(1, 1, 1), size=32, patch=16, positions=64, norm="pre", reconstructor=True
)


@dataclass(frozen=True, kw_only=True)
class ConvConfig(ImageEncoderConfig):
    width: int
    stride: int = 8

    @property
    def grid(self):
        return self.size // self.stride

    def build(self):
        return Conv(self)


class Conv(ImageEncoder):
    def __init__(self, config):
        super().__init__(config)
        kernel = nn.Conv2d(3, config.width, config.stride, config.stride)
        self.layers = nn.Sequential(kernel, nn.GELU(), nn.Conv2d(config.width, config.width, 3, padding=1))

    def forward(self, image, keep_BK=None):
        return self.layers(self.normalised(image)).flatten(2).transpose(1, 2)


def with_conv(run, name, model):
    return replace(run, name=name, model=replace(model, image=ConvConfig(size=32, width=24)), keep=1.0, budget_s=None)
"""
RECIPES = {
    "conv_clip": "with_conv(flip_demo(), 'conv_clip', two_towers(SMALL, width=16))",
    "conv_flm": "with_conv(flm_demo(), 'conv_flm', SMALL)",
    "conv_brivl": "with_conv(brivl_demo(), 'conv_brivl', brivl_tiny(size=32))",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("own")
    write_world(folder / "world", WorldConfig(size=32, captions=2), train=24, val=4, test=4, pairs=0, singles=0)
    (folder / "conv_encoder.py").write_text(ENCODER)
    for name, recipe in RECIPES.items():
        (folder / f"{name}.py").write_text(f"from conv_encoder import *\n\n\ndef {name}():\n    return {recipe}\n")
    return folder


def pretrain(folder: Path, name: str, out: Path, *options: str) -> int:
    world, recipe = folder / "world", folder / f"{name}.py"
    # At a constant rate, so that the first steps are those of a longer run.
    fixed = (
        f"--data.train {world / 'train'} --data.val {world / 'val'} --data.batch-size 8 --vocab 200 --precision fp32 "
        "--device cpu --optim.warmup 0 --optim.decay constant --validate-every None --log-every 1"
    )
    return main(["pretrain", str(recipe), "--out", str(out), *fixed.split(), *options])


def states(run: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(run / "last.pt")["pretraining"]


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_it_pretrains_is_counted_and_resumes_bit_for_bit(folder, tmp_path, name):
    assert pretrain(folder, name, tmp_path / "a", "--steps", "4") == 0
    assert pretrain(folder, name, tmp_path / "b", "--steps", "2") == 0
    assert pretrain(folder, name, tmp_path / "b", "--steps", "4", "--resume") == 0
    straight, resumed = states(tmp_path / "a"), states(tmp_path / "b")
    assert "model.image.layers.0.weight" in straight and straight.keys() == resumed.keys()
    assert [key for key in straight if not torch.equal(straight[key], resumed[key])] == []
    events = [json.loads(line) for line in (tmp_path / "a" / "log.jsonl").read_text().splitlines()]
    counted = [event["flops_per_s"] for event in events if "flops_per_s" in event]
    assert len(counted) == 4 and min(counted) > 0
    assert json.loads((tmp_path / "a" / "model.json").read_text())["config"]["image"]["type"] == "ConvConfig"


def test_its_fields_are_options_and_patches_that_it_cannot_drop_are_refused(folder, tmp_path, capsys):
    assert pretrain(folder, "conv_clip", tmp_path / "a", "--steps", "1", "--model.image.stride", "16") == 0
    assert load_model(tmp_path / "a").model.config.image.grid == 2
    assert pretrain(folder, "conv_clip", tmp_path / "b", "--steps", "1", "--keep", "0.5") == 2
    assert "ConvConfig" in capsys.readouterr().err
    assert pretrain(folder, "conv_brivl", tmp_path / "c", "--steps", "1", "--objectives.moco.key-keep", "0.5") == 2
    assert "ConvConfig" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("right", "wrong"), [("    width: int\n", ""), ("self.size // self.stride", "self.size // self.stride + 1")]
)
def test_a_config_that_is_not_what_the_module_returns_is_refused(folder, tmp_path, capsys, right, wrong):
    """Without a width, and with a grid that is too large."""
    name = f"wrong_{len(wrong)}"
    assert right in ENCODER
    code = ENCODER.replace(right, wrong).replace(", width=24)", ")" if not wrong else ", width=24)")
    code += f"\n\ndef {name}():\n    return with_conv(flm_demo(), '{name}', SMALL)\n"
    (folder / f"{name}.py").write_text(code)
    assert pretrain(folder, name, tmp_path / "run", "--steps", "1") == 2
    error = capsys.readouterr().err
    assert "ConvConfig" in error and ("grid" if wrong else "width") in error


def load_without_and_with(file: Path, export: Path) -> tuple[str, tuple[int, ...]]:
    """Why the export cannot be loaded before the file is imported, and the shape of its vectors after that."""
    with pytest.raises(UserError) as refused:
        Embedder.load(export)
    import_file(file)
    return str(refused.value), Embedder.load(export).texts(["a red cube"]).shape


@pytest.mark.slow
def test_it_is_exported_and_loaded_where_its_file_is_imported(folder, tmp_path, capsys):
    assert pretrain(folder, "conv_clip", tmp_path / "run", "--steps", "2") == 0
    import_file(folder / "conv_encoder.py")
    words = ["--import", str(folder / "conv_encoder.py"), "export", str(tmp_path / "run"), str(tmp_path / "export")]
    assert main(words) == 0
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8))
    vectors = Embedder.load(tmp_path / "export", device="cpu").images([picture])
    assert vectors.shape == (1, 16) and np.linalg.norm(vectors) == pytest.approx(1, abs=1e-5)

    refused, loaded = in_new_process(load_without_and_with, folder / "conv_encoder.py", tmp_path / "export")
    assert "model.json" in refused and "ConvConfig" in refused and "--import" in refused
    assert loaded == (1, 16)
