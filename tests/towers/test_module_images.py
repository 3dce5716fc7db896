"""An nn.Module that a function in a user's file makes is an image encoder: it trains, resumes, is exported and loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastvlp.cli import main
from fastvlp.data.world.corpus import WorldConfig, write_world
from fastvlp.errors import UserError
from fastvlp.extensions import import_file
from fastvlp.model.encoders.module_images import ModuleImagesConfig, from_module
from fastvlp.model.saving import load_model
from fastvlp.search.embedder import Embedder
from fastvlp.training.checkpoint import load_checkpoint
from tests.processes import in_new_process
from tests.towers.public import write_public

FILE = '''
from dataclasses import replace

import torch
from torch import nn

from fastvlp.model.encoders.module_images import from_module
from fastvlp.model.inherited_config import with_image
from fastvlp.recipes.clip_photos import clip_photos
from fastvlp.recipes.flm_photos import flm_photos


class Trunk(nn.Module):
    """Like a model of timm without its head: a map."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 12, 8, 8), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 20, 2, 2))
        self.classifier = nn.Linear(20, 5)

    def forward(self, x):
        return self.layers(x)


def trunk(pretrained: bool) -> nn.Module:
    module = Trunk()
    if pretrained:
        nn.init.constant_(module.layers[0].bias, 7.0)
    return module


def no_module(pretrained: bool):
    return 3


def with_trunk(run):
    image = from_module(trunk, size=32, fixed_statistics=True)
    return replace(run, model=with_image(run.model, image))
'''
RECIPES = {"trunk_clip": "with_trunk(clip_photos())", "trunk_flm": "with_trunk(flm_photos())"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("module")
    write_world(folder / "world", WorldConfig(size=32, captions=2), train=24, val=4, test=4, pairs=0, singles=0)
    (folder / "trunk_file.py").write_text(FILE)
    for name, run in RECIPES.items():
        (folder / f"{name}.py").write_text(f"from trunk_file import *\n\n\ndef {name}():\n    return {run}\n")
    write_public("bert", folder / "bert")
    return folder


def pretrain(folder: Path, name: str, out: Path, *options: str) -> int:
    world = folder / "world"
    fixed = (
        f"--data.train {world / 'train'} --data.val {world / 'val'} --data.batch-size 8 --vocab 200 --precision fp32 "
        "--device cpu --optim.warmup 0 --optim.decay constant --validate-every None --budget-s None --threads 1"
    )
    return main(["pretrain", str(folder / f"{name}.py"), "--out", str(out), *fixed.split(), *options])


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_it_trains_and_resumes_bit_for_bit(name, folder, tmp_path):
    assert pretrain(folder, name, tmp_path / "a", "--steps", "3") == 0
    assert pretrain(folder, name, tmp_path / "b", "--steps", "2") == 0
    assert pretrain(folder, name, tmp_path / "b", "--steps", "3", "--resume") == 0
    straight, resumed = (load_checkpoint(tmp_path / run / "last.pt")["pretraining"] for run in "ab")
    assert [key for key in straight if not torch.equal(straight[key], resumed[key])] == []


def test_its_weights_are_those_of_the_function_and_what_is_not_read_is_not_trained(folder, tmp_path):
    more = ["--text", str(folder / "bert")]
    assert pretrain(folder, "trunk_clip", tmp_path, "--steps", "1", "--optim.lr", "1e-12", *more) == 0
    model = load_model(tmp_path).model
    assert model.image.module.layers[0].bias.tolist() == [7.0] * 12 and model.config.text.width == 32
    assert model.config.embed.image.pool == "mean"
    assert (model.config.image.width, model.config.image.grid, model.config.image.prefix) == (20, 2, 0)
    assert not model.image.module.classifier.weight.requires_grad
    model.train()
    assert not model.image.module.layers[1].training


def load_without_and_with(file: Path, export: Path) -> tuple[str, tuple[int, ...]]:
    """Why the export cannot be loaded before the file is imported, and the shape of its vectors after that."""
    with pytest.raises(UserError) as refused:
        Embedder.load(export)
    import_file(file)
    return str(refused.value), Embedder.load(export).texts(["a red cube"]).shape


@pytest.mark.slow
def test_it_is_loaded_where_its_file_is_imported(folder, tmp_path):
    assert pretrain(folder, "trunk_clip", tmp_path / "run", "--steps", "1") == 0
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "export")]) == 0
    refused, loaded = in_new_process(load_without_and_with, folder / "trunk_file.py", tmp_path / "export")
    assert "trunk_file" in refused and "--import" in refused and loaded == (1, 256)


def tokens(pretrained: bool) -> torch.nn.Module:
    class Tokens(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.patches = torch.nn.Conv2d(3, 8, 8, 8)
            self.first = torch.nn.Parameter(torch.zeros(1, 5, 8))

        def forward(self, x):
            return torch.cat([self.first.expand(len(x), -1, -1), self.patches(x).flatten(2).transpose(1, 2)], 1)

    return Tokens()


def vectors(pretrained: bool) -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 16 * 16, 4))


def test_tokens_have_a_map_behind_their_prefix():
    config = from_module(tokens, size=16, patch=8)
    assert (config.prefix, config.grid, config.width) == (5, 2, 8)
    with torch.inference_mode():
        assert from_module(tokens, size=24, patch=8).tokens == 14
        assert config.build()(torch.zeros(2, 3, 16, 16, dtype=torch.uint8)).shape == (2, 9, 8)


def test_what_is_no_encoder_is_refused(folder):
    with pytest.raises(UserError, match=r"\[B N D\]"):
        from_module(vectors, size=16).check()
    with pytest.raises(UserError, match="top level"):
        from_module(lambda pretrained: vectors(pretrained), size=16)
    import_file(folder / "trunk_file.py")
    for name in ("trunk_file:no_module", "trunk_file:torch", "trunk_file:nothing", "os:getcwd", "unknown:trunk"):
        with pytest.raises(UserError, match=name.partition(":")[0]):
            ModuleImagesConfig(size=16, function=name).check()
