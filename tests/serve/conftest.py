"""A small corpus, barely trained runs on it, and what is exported of them, that all tests of serving share."""

from dataclasses import replace
from pathlib import Path

import pytest

from fastvlp.data.pairs import PairData
from fastvlp.data.records.shards import Shards
from fastvlp.data.world.corpus import WorldConfig, write_world
from fastvlp.exporters.native import export
from fastvlp.model.sizes import joint_space, tiny, two_towers
from fastvlp.objectives.clip import CLIPConfig
from fastvlp.objectives.flm import FLMConfig
from fastvlp.objectives.itm import ITMConfig
from fastvlp.search.embedder import Embedder
from fastvlp.serve.options import Export
from fastvlp.tasks.vqa import VQAConfig, VQAData, frequent_answers
from fastvlp.training.loop import train
from fastvlp.training.optim import OptimConfig
from fastvlp.training.state import TrainConfig


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    write_world(folder, WorldConfig(size=32, captions=2), train=24, val=4, test=12, pairs=0, singles=0)
    return folder


@pytest.fixture(scope="session")
def runs(world, tmp_path_factory) -> dict[str, Path]:
    """Folders: `towers` embeds; `all` also captions and matches; `vqa` answers."""
    folder, model = tmp_path_factory.mktemp("runs"), tiny(size=32, patch=8)
    everything = TrainConfig(
        name="all",
        out=str(folder / "all"),
        data=PairData(train=str(world / "train"), val=str(world / "val"), batch_size=8, max_length=40, fit="squash"),
        model=replace(model, embed=joint_space(model, width=16)),
        objectives={"clip": CLIPConfig(), "itm": ITMConfig(candidates=1), "flm": FLMConfig()},
        optim=OptimConfig(lr=1e-3),
        steps=1,
        vocab=400,
        precision="fp32",
    )
    answers = frequent_answers(str(world / "train"), most=20)
    made = [
        everything,
        replace(
            everything,
            name="towers",
            out=str(folder / "towers"),
            model=two_towers(model, width=16),
            objectives={"clip": CLIPConfig()},
        ),
        replace(
            everything,
            name="vqa",
            out=str(folder / "vqa"),
            data=VQAData(train=str(world / "train"), batch_size=8, answers=answers),
            model=model,
            objectives={"vqa": VQAConfig(reading="full", answers=len(answers))},
            init=str(folder / "all"),
        ),
    ]
    for run in made:
        train(run)
    return {run.name: run.folder for run in made}


@pytest.fixture(scope="session")
def exports(runs, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("exports")
    for name, run in runs.items():
        export(Export(run=str(run), out=folder / name))
    return {name: folder / name for name in runs}


@pytest.fixture(scope="session")
def embedder(exports) -> Embedder:
    """Of two towers."""
    return Embedder.load(exports["towers"])


@pytest.fixture(scope="session")
def shards(world) -> Shards:
    return Shards(world / "test")


@pytest.fixture(scope="session")
def pictures(shards) -> list[bytes]:
    return [record.images[0] for record in shards]
