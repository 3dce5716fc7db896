"""Objectives in a user's own file: they train, are scored, exported and loaded with no change to the package."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fastvlp.cli import main
from fastvlp.comparison.metrics.cloze_accuracy import cloze_methods
from fastvlp.data.pairs import PairData
from fastvlp.data.world.corpus import WorldConfig, write_world
from fastvlp.errors import UserError
from fastvlp.extensions import import_file
from fastvlp.model.saving import load_model
from fastvlp.model.sizes import joint_space, tiny
from fastvlp.objectives.objective import ObjectiveConfig
from fastvlp.objectives.saved_objectives import abilities, learned_abilities, load_objective, saved_configs
from fastvlp.search.embedder import Embedder
from fastvlp.training.loop import steps, train
from fastvlp.training.optim import OptimConfig
from fastvlp.training.start import start
from fastvlp.training.train_config import TrainConfig
from tests.made import made_batch

FILE = '''
"""Margin: a hinge loss of pairs. Fits: a head that says how well a text fits an image, and a cloze method of its own."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from fastvlp.objectives.objective import Loss, Objective, ObjectiveConfig, PairObjective


@dataclass(frozen=True, kw_only=True)
class MarginConfig(ObjectiveConfig):
    margin: float = 0.2

    def build(self, model, tokenizer):
        return Margin(self)


class Margin(PairObjective):
    def __init__(self, config):
        super().__init__()
        self.config = config

    def counts(self, batch):
        return {"pairs": batch.length.new_tensor(len(batch))}

    def embed(self, model, image_BKD, batch):
        return model.embed_image(image_BKD), model.embed_text(batch.ids, batch.length)

    def score(self, image_BE, text_BE):
        texts_ME, first = self.gather_rows(text_BE)
        own_B = first + torch.arange(len(image_BE), device=image_BE.device)
        score_BM = image_BE @ texts_ME.T
        right_B1 = score_BM.gather(1, own_B[:, None])
        wrong = F.relu(self.config.margin + score_BM - right_B1).scatter(1, own_B[:, None], 0)
        return {"pairs": Loss(wrong.mean(1).sum(), own_B.new_tensor(len(own_B)))}


@dataclass(frozen=True, kw_only=True)
class FitsConfig(ObjectiveConfig):
    word: int = 7

    def build(self, model, tokenizer):
        return Fits(self, model)


class Fits(Objective):
    abilities = frozenset({"match"})

    def __init__(self, config, model):
        super().__init__()
        self.config = config
        self.score = nn.Linear(model.text.layer.width, 1)

    @property
    def cloze_method(self):
        return lambda model, image_BKD, batch: torch.full_like(batch.ids, self.config.word)

    @property
    def pair_scorer(self):
        return self.fit

    def fit(self, model, image_BKD, ids_BL, length_B):
        return self.score(model.summarise(image_BKD, ids_BL, length_B, reading="full"))[:, 0].float()

    def counts(self, batch):
        return {"fits": batch.length.new_tensor(2 * len(batch))}

    def forward(self, model, image_BKD, batch):
        own = self.fit(model, image_BKD, batch.ids, batch.length)
        other = self.fit(model, image_BKD, batch.ids.roll(1, 0), batch.length.roll(1, 0))
        total = F.softplus(-own).sum() + F.softplus(other).sum()
        return {"fits": Loss(total, self.counts(batch)["fits"])}
'''
RECIPE = """
from dataclasses import replace

from fastvlp.recipes.flm_demo import flm_demo
from own_objectives import FitsConfig


def own_recipe():
    return replace(flm_demo(), objectives={"fits": FitsConfig()})
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("own")
    (folder / "own_objectives.py").write_text(FILE)
    (folder / "own_recipe.py").write_text(RECIPE)
    write_world(folder / "world", WorldConfig(size=32, captions=2), train=12, val=4, test=4, pairs=0, singles=0)
    return folder


@pytest.fixture(scope="module", autouse=True)
def forget_the_file(folder: Path) -> Iterator[None]:
    before = list(sys.path)
    yield
    sys.path[:] = before
    for name in ("own_objectives", "own_recipe"):
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def run(folder: Path) -> TrainConfig:
    own = import_file(folder / "own_objectives.py")
    model = tiny(size=32, patch=8, reconstructor=False)
    return TrainConfig(
        name="own",
        out=str(folder / "run"),
        data=PairData(train=str(folder / "world/train"), val=str(folder / "world/val"), batch_size=4, max_length=40),
        model=replace(model, embed=joint_space(model, width=16)),
        objectives={"margin": own.MarginConfig(margin=0.3), "fits": own.FitsConfig()},
        optim=OptimConfig(lr=1e-3),
        steps=2,
        accumulate=2,
        vocab=300,
        precision="fp32",
        log_every=1,
    )


@pytest.fixture(scope="module")
def trained(run: TrainConfig) -> Path:
    train(run)
    return run.folder


def test_they_train_with_cached_gradients_and_are_counted(trained: Path) -> None:
    lines = [json.loads(line) for line in (trained / "log.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "train"]
    assert len(steps) == 2 and all({"loss/margin/pairs", "loss/fits/fits"} < {*line} for line in steps)
    assert all(line["flops_per_s"] > 0 for line in steps)


@pytest.mark.parametrize(("objective", "method"), [("margin", "score"), ("fits", "forward")])
def test_a_loss_with_another_name_than_its_count_stops_the_first_step(
    run: TrainConfig, tmp_path: Path, objective: str, method: str
) -> None:
    state = start(replace(run, out=str(tmp_path)))
    module = state.pretraining.objectives[objective]
    losses = getattr(module, method)
    setattr(module, method, lambda *inputs: {"rows": next(iter(losses(*inputs).values()))})
    with pytest.raises(UserError, match=f"objective {objective}: .*(pairs|fits).*rows"):
        next(steps(state))


def test_their_abilities_are_saved_and_they_load_with_their_parameters(run: TrainConfig, trained: Path) -> None:
    saved = load_model(trained)
    assert abilities(saved) == {"margin": {"embed"}, "fits": {"match"}}
    assert saved_configs(saved) == run.objectives
    assert torch.equal(load_objective(saved, "fits").score.weight, saved.objectives["fits.score.weight"])


def test_their_export_embeds_and_matches(trained: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(trained), str(folder / "export")]) == 0
    embedder = Embedder.load(folder / "export")
    assert embedder.can == {"embed", "match"}
    embedder.model.eval()
    image = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    assert np.linalg.norm(embedder.images(image)) == pytest.approx(1, abs=1e-5)
    saved = load_model(trained)
    ids, length = saved.tokenizer.encode(["a red circle"], 40)
    with torch.no_grad():
        states = saved.model.eval().encode_image(image)
        expected = load_objective(saved, "fits").fit(saved.model, states, ids, length)
    assert embedder.match(image, ["a red circle"]) == pytest.approx(expected.numpy(), abs=1e-5)


def test_the_cloze_method_is_the_objectives_own(folder: Path, run: TrainConfig) -> None:
    (method,) = cloze_methods(start(replace(run, out=str(folder / "cloze")))).values()
    assert method(None, None, made_batch(lengths=(5, 4))).eq(7).all()


def test_a_type_that_is_not_known_is_named_with_the_remedy(trained: Path) -> None:
    saved = load_model(trained)
    unknown = {name: {**config, "type": "MissingConfig"} for name, config in saved.info["objectives"].items()}
    saved = saved._replace(info={**saved.info, "objectives": unknown})
    # What needs no code of the objective goes on.
    assert learned_abilities(saved) == {"embed", "match"}
    with pytest.raises(UserError, match=r"objective 'fits': MissingConfig.*--import"):
        load_objective(saved, "fits")


def test_models_saved_before_abilities_are_asked_by_building(trained: Path) -> None:
    saved = load_model(trained)
    older = {key: value for key, value in saved.info.items() if key not in ("abilities", "bos", "inherited_abilities")}
    assert abilities(saved._replace(info=older)) == abilities(saved)


def test_a_recipe_with_it_runs_from_the_command_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["--data.train", "world/train", "--data.val", "None", "--data.batch-size", "4", "--vocab", "300"]
    options += ["--steps", "1", "--out", "from-command", "--objectives.fits.word", "9", "--precision", "fp32"]
    monkeypatch.chdir(folder)
    assert main(["--import", "own_objectives.py", "pretrain", "own_recipe.py", *options]) == 0
    assert load_model(folder / "from-command").info["objectives"]["fits"] == {"type": "FitsConfig", "word": 9}


def test_both_are_configs_of_objectives(run: TrainConfig) -> None:
    assert all(isinstance(config, ObjectiveConfig) for config in run.objectives.values())
