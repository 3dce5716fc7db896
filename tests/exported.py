"""Fixtures of search, exporters and serve: a small corpus, barely trained runs on it, and their exports.

Every test session loads this module; so it imports the library only where a fixture is used.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from fastvlp.data.records.shards import Shards
    from fastvlp.search.embedder import Embedder
    from fastvlp.training.train_config import TrainConfig


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from fastvlp.data.world.corpus import WorldConfig, write_world

    folder = tmp_path_factory.mktemp("world")
    write_world(folder, WorldConfig(size=32, captions=2), train=24, val=4, test=12, pairs=0, singles=0)
    return folder


@pytest.fixture(scope="session")
def runs(world: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders: `towers` embeds; `all` also captions and matches; `vqa` answers."""
    from fastvlp.training.loop import train

    configs = run_configs(world, tmp_path_factory.mktemp("runs"))
    for config in configs:
        train(config)
    return {config.name: config.folder for config in configs}


def run_configs(world: Path, folder: Path) -> list[TrainConfig]:
    from dataclasses import replace

    from fastvlp.data.pairs import PairData
    from fastvlp.model.sizes import joint_space, two_towers
    from fastvlp.objectives.clip import CLIPConfig
    from fastvlp.objectives.flm import FLMConfig
    from fastvlp.objectives.itm import ITMConfig
    from fastvlp.tasks.vqa import VQAConfig, VQAData, frequent_answers
    from fastvlp.training.optim import OptimConfig
    from fastvlp.training.train_config import TrainConfig
    from tests.made import small_model

    model = small_model(patch=8)
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
    towers = replace(
        everything,
        name="towers",
        out=str(folder / "towers"),
        model=two_towers(model, width=16),
        objectives={"clip": CLIPConfig()},
    )
    answers = frequent_answers(str(world / "train"), most=20)
    vqa = replace(
        everything,
        name="vqa",
        out=str(folder / "vqa"),
        data=VQAData(train=str(world / "train"), batch_size=8, answers=answers),
        model=model,
        objectives={"vqa": VQAConfig(reading="full", answers=len(answers))},
        init=str(folder / "all"),
    )
    return [everything, towers, vqa]


@pytest.fixture(scope="session")
def exports(runs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    from fastvlp.exporters.export import export

    folder = tmp_path_factory.mktemp("exports")
    for name, run in runs.items():
        export(run, folder / name)
    return {name: folder / name for name in runs}


@pytest.fixture(scope="session")
def embedder(exports: dict[str, Path]) -> Embedder:
    """An embedder with two towers."""
    from fastvlp.search.embedder import Embedder

    return Embedder.load(exports["towers"])


@pytest.fixture(scope="session")
def shards(world: Path) -> Shards:
    from fastvlp.data.records.shards import Shards

    return Shards(world / "test")


@pytest.fixture(scope="session")
def pictures(shards: Shards) -> list[bytes]:
    return [record.images[0] for record in shards]
