"""A small corpus and barely trained runs on it, that all tests of the tasks share."""

from dataclasses import replace

import pytest

from fastvlp.data.pairs import PairData
from fastvlp.data.regions import RegionSource
from fastvlp.data.world.corpus import WorldConfig, write_world
from fastvlp.objectives.flm import FLMConfig
from fastvlp.objectives.mlm import MLMConfig
from fastvlp.objectives.wra import WRAConfig
from fastvlp.training.loop import train
from fastvlp.training.optim import OptimConfig
from fastvlp.training.train_config import TrainConfig
from tests.made import small_model, small_single


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    write_world(folder, WorldConfig(size=32), train=24, val=4, test=6, pairs=16, singles=0)
    return folder


@pytest.fixture(scope="session")
def runs(world, tmp_path_factory):
    """Folders of an FLM run (two streams over the text), of an MLM run (one), and of a single stream over text and
    regions."""
    folder = tmp_path_factory.mktemp("runs")
    flm = TrainConfig(
        name="flm",
        out=str(folder / "flm"),
        data=PairData(train=str(world / "train"), batch_size=8, max_length=40),
        model=small_model(),
        objectives={"flm": FLMConfig()},
        optim=OptimConfig(lr=1e-3),
        steps=2,
        vocab=400,
        precision="fp32",
    )
    mlm = replace(
        flm,
        name="mlm",
        out=str(folder / "mlm"),
        model=small_model(reconstructor=False),
        objectives={"mlm": MLMConfig()},
    )
    uniter = replace(
        flm,
        name="uniter",
        out=str(folder / "uniter"),
        data=replace(flm.data, regions=RegionSource(most=20)),
        model=small_single(),
        objectives={"itm": WRAConfig(), "mlm": MLMConfig()},
    )
    for run in (flm, mlm, uniter):
        train(run)
    return {name: folder / name for name in ("flm", "mlm", "uniter")}
