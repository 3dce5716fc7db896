"""A small corpus and a barely trained run on it with both towers' embeddings and layers that read text beside the image."""

from dataclasses import replace

import pytest

from fastvlp.data.pairs import PairData
from fastvlp.data.world.corpus import WorldConfig, write_world
from fastvlp.model.sizes import joint_space
from fastvlp.objectives.clip import CLIPConfig
from fastvlp.objectives.flm import FLMConfig
from fastvlp.objectives.itm import ITMConfig
from fastvlp.training.loop import train
from fastvlp.training.optim import OptimConfig
from fastvlp.training.train_config import TrainConfig
from tests.made import small_model


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    write_world(folder, WorldConfig(size=32, captions=2), train=24, val=4, test=6, pairs=0, singles=70)
    return folder


@pytest.fixture(scope="session")
def runs(world, tmp_path_factory):
    """Folders: `both` has embeddings, a matching head and a causal stream; `flm` has the stream alone."""
    folder = tmp_path_factory.mktemp("runs")
    model = small_model(patch=8)
    both = TrainConfig(
        name="both",
        out=str(folder / "both"),
        data=PairData(train=str(world / "train"), batch_size=8, max_length=40, captions="captions_zh", fit="squash"),
        model=replace(model, embed=joint_space(model, width=16)),
        objectives={"clip": CLIPConfig(), "itm": ITMConfig(candidates=1), "flm": FLMConfig()},
        optim=OptimConfig(lr=1e-3),
        steps=2,
        vocab=400,
        precision="fp32",
    )
    flm = replace(both, name="flm", out=str(folder / "flm"), model=model, objectives={"flm": FLMConfig()})
    for run in (both, flm):
        train(run)
    return {run.name: run.folder for run in (both, flm)}
