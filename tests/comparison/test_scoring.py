"""Scoring on the embedded corpus with a model of a few thousand weights: it measures, and leaves training as it was."""

import base64
import gc
import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from fastvlp.cli import main
from fastvlp.comparison.metrics.cloze_accuracy import cloze_methods
from fastvlp.comparison.metrics.interface import Metric, Score, metric_types
from fastvlp.comparison.results import Comparison
from fastvlp.comparison.samples import data_url
from fastvlp.comparison.scored_data import question_data, spread_evenly
from fastvlp.comparison.scoring import MetricScorer
from fastvlp.comparison.scoring_options import ScoringOptions
from fastvlp.data.pairs import PairData
from fastvlp.data.world.corpus import WorldConfig, write_world
from fastvlp.errors import UserError
from fastvlp.model.saving import load_model
from fastvlp.model.sizes import two_towers
from fastvlp.objectives.ar import ARConfig
from fastvlp.objectives.clip import CLIPConfig
from fastvlp.objectives.cloze_methods import predict_causal, predict_masked
from fastvlp.objectives.flm import FLMConfig, predict_flm
from fastvlp.objectives.itm import ITMConfig
from fastvlp.objectives.mlm import MLMConfig
from fastvlp.objectives.objective import ObjectiveConfig
from fastvlp.objectives.prefixlm import PrefixLMConfig
from fastvlp.tasks.items import Item
from fastvlp.training.loop import start, steps
from fastvlp.training.optim import OptimConfig
from fastvlp.training.state import TrainState
from fastvlp.training.train_config import TrainConfig
from tests.made import small_model
from tests.made_arms import small_config

OPTIONS = ScoringOptions(probe_steps=2, probe_batch=4, probe_items=20, cloze_items=4, caption_items=2, pictures=2)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    write_world(folder, WorldConfig(), train=24, val=8, test=8, pairs=0, singles=0)
    return folder


def run(world: Path, objective: ObjectiveConfig, **more: object) -> TrainConfig:
    return small_config(world, objective, name="small", vocab=200, precision="fp32", **more)


def weights(state: TrainState) -> list[torch.Tensor]:
    return [p.detach().clone() for p in state.pretraining.parameters()]


@pytest.mark.slow
@pytest.mark.parametrize("objective", [FLMConfig(), MLMConfig(), ARConfig(), PrefixLMConfig()])
def test_scoring_changes_nothing(world: Path, objective: ObjectiveConfig) -> None:
    straight = start(run(world, objective, ema=0.9))
    for _ in steps(straight):
        pass
    scored = start(run(world, objective, ema=0.9))
    scorer = MetricScorer(OPTIONS)
    for _ in steps(scored):
        if scored.step in (2, 5):
            before = weights(scored)
            found = scorer.score(scored)
            assert {"vqa", "cider"} < set(found.values) <= {"cloze", "next_word", "vqa", "cider"}
            assert all(0 <= value <= 1 for name, value in found.values.items() if name != "cider")
            assert found.errors.keys() == found.values.keys() - {"cider"} and 0 < found.chance["vqa"] < 1
            assert 0 <= found.blind["vqa"] <= 1
            assert scorer.score(scored, tuned=False).values.keys() <= {"cloze", "next_word"}
            assert all(torch.equal(a, b) for a, b in zip(before, weights(scored)))
            assert scored.pretraining.training
    assert all(torch.equal(a, b) for a, b in zip(weights(straight), weights(scored)))


def test_the_same_state_has_the_same_scores(world: Path) -> None:
    state = start(run(world, FLMConfig()))
    assert MetricScorer(OPTIONS).score(state) == MetricScorer(OPTIONS).score(state)


def test_averaged_weights_are_scored(world: Path) -> None:
    state = start(run(world, MLMConfig(), ema=0.5))
    next(steps(state))
    before = MetricScorer(OPTIONS).score(state)
    with torch.no_grad():
        for p in state.pretraining.parameters():
            p.zero_()
    assert MetricScorer(OPTIONS).score(state) == before


def test_each_objective_has_its_own_cloze_method(world: Path) -> None:
    for objective, methods in (
        (FLMConfig(), {"cloze": predict_flm, "next_word": predict_causal}),
        (MLMConfig(), {"cloze": predict_masked}),
        (PrefixLMConfig(), {"next_word": predict_causal}),
        (ITMConfig(), {}),
    ):
        found = cloze_methods(start(run(world, objective)))
        assert {name: getattr(method, "func", method) for name, method in found.items()} == methods


def test_questions_come_from_the_records_or_the_folder(world: Path, tmp_path: Path) -> None:
    data = run(world, MLMConfig()).data
    own = question_data(data, OPTIONS)
    assert own is not None and own.questions == "questions" and own.train == str(world / "train")
    assert isinstance(data, PairData)
    chinese = question_data(replace(data, captions="captions_zh"), OPTIONS)
    assert chinese is not None and chinese.questions == "questions_zh"
    given = question_data(data, replace(OPTIONS, vqa=str(world)))
    assert given is not None and given.val == str(world / "val") and given.questions == "questions"
    by_field = {
        field: question_data(replace(data, captions=field), replace(OPTIONS, vqa=str(world)))
        for field in ("captions_zh", "captions_fr")
    }
    assert [questions.questions for questions in by_field.values() if questions] == ["questions_zh", "questions"]
    assert by_field["captions_zh"] and "是" in by_field["captions_zh"].answers
    with pytest.raises(UserError, match="'test'"):
        MetricScorer(replace(OPTIONS, split="test")).score(start(run(world, MLMConfig())))


def test_questions_are_spread_over_the_split() -> None:
    items = [Item(i, "x", {}) for i in range(39)]
    assert [item.record for item in spread_evenly(items, 20)] == [i * 39 // 20 for i in range(20)]
    assert spread_evenly(items, 20)[-1].record == 37
    assert spread_evenly(items, 39) == spread_evenly(items, 100) == items and spread_evenly([], 5) == []


def test_samples_show_captions_and_answers_of_each_arm(world: Path) -> None:
    states = {
        name: start(replace(run(world, objective), name=name))
        for name, objective in (("a", FLMConfig()), ("b", ARConfig()))
    }
    scorer = MetricScorer(OPTIONS)
    for state in states.values():
        scorer.score(state)
    samples = scorer.samples(states)
    assert len(samples) == 2
    for sample in samples:
        assert set(sample.captions) == {"a", "b"} and len(sample.references) == 5
        assert 1 <= len(sample.questions) <= 3
        assert all(set(question.answers) == {"a", "b"} and question.right for question in sample.questions)


def test_pictures_of_the_page() -> None:
    image = torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8)
    head, _, body = data_url(image).partition(",")
    assert head == "data:image/png;base64"
    read = torch.tensor(list(Image.open(io.BytesIO(base64.b64decode(body))).convert("RGB").tobytes())).view(64, 64, 3)
    assert torch.equal(read.permute(2, 0, 1).to(torch.uint8), image)
    assert data_url(torch.zeros(3, 224, 224, dtype=torch.uint8)).startswith("data:image/jpeg")


RECIPE = """
from fastvlp.data.pairs import PairData
from fastvlp.objectives.{module} import {config}
from fastvlp.training.optim import OptimConfig
from fastvlp.training.train_config import TrainConfig
from tests.made import small_model

def {name}():
    return TrainConfig(name="x", data=PairData(train="?", val="?", batch_size=4), model=small_model(), vocab=200,
        objectives={{"{module}": {config}()}}, optim=OptimConfig(lr=1e-3), steps=10, precision="fp32", device="cpu")
"""


@pytest.mark.slow
def test_the_command(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipes = []
    for name, config in (("flm", "FLMConfig"), ("mlm", "MLMConfig")):
        path = tmp_path / f"my_{name}.py"
        path.write_text(RECIPE.format(module=name, config=config, name=f"my_{name}"))
        recipes.append(str(path))
    out = tmp_path / "out"
    options = ["--budget", "1s", "--slice", "0.3s", "--marks", "0.5", "1", "--probe-steps", "2", "--probe-batch", "4"]
    few = ["--probe-items", "8", "--cloze-items", "4", "--pictures", "1", "--out", str(out)]
    data = [f"data.train={world / 'train'}", f"data.val={world / 'val'}", "model.image.size=32"]
    code = main(["compare", *recipes, *options, *few, "--set", *data])
    printed = capsys.readouterr()
    assert code == 0, printed.err
    assert "my_flm" in printed.out and "VQA accuracy" in printed.out
    assert printed.out.splitlines()[-1] == str(out / "report.html")
    comparison = Comparison.load(out / "results.json")
    assert comparison.reference == "my_mlm"
    assert [len(run.marks) for run in comparison.runs] == [2, 2]
    assert all(run.marks[-1].spent.time >= 0.9 for run in comparison.runs)
    assert comparison.configs["my_flm"]["model"]["image"]["size"] == 32
    assert "my_mlm" in (out / "report.html").read_text("utf-8")
    assert json.loads((out / "results.json").read_text("utf-8"))["about"]["command"].startswith("vlp")
    assert {path.name for path in out.iterdir()} == {"results.json", "report.html", "runs", "tokenizer-my_flm.json"}
    assert load_model(out / "runs" / "my_flm-0").info["task"] == "flm"


def test_mistakes_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    for words, message in (
        (["flm_dmo"], "flm_demo"),
        (["flm_demo", "--budget", "soon"], "'soon'"),
        (["flm_demo", "flm_demo"], "called flm_demo"),
        (["flm_demo", "--set", "optim.rate=1"], "--set optim.rate=1"),
        (["flm_demo", "--set", "optim.rate=1", "--set", "vocab=9"], "--set optim.rate=1"),
        (["flm_demo", "--set", "mlm_demo:vocab=9"], "--set mlm_demo:vocab=9"),
        (["flm_demo", "--marks", "2"], "--marks"),
        (["flm_demo", "--seeds", "0"], "--seeds"),
        (["flm_demo", "--cloze-items", "0"], "--cloze-items must be at least 1"),
        (["flm_demo", "--pictures", "-1"], "--pictures"),
        ([], "flm_demo"),
    ):
        assert main(["compare", *words]) == 2
        assert message in capsys.readouterr().err


def test_a_metric_of_ones_own_is_measured(world: Path) -> None:
    class StepsTaken(Metric):
        scores = (Score("steps", "Steps"),)

        def fits(self, state: TrainState) -> bool:
            return state.run.name == "small"

        def measure(self, state: TrainState) -> dict[str, float]:
            return {"steps": float(state.step)}

    try:
        assert metric_types()[-1] is StepsTaken
        state = start(run(world, ITMConfig()))
        scores = MetricScorer(replace(OPTIONS, caption_items=0)).score(state)
        assert set(scores.values) == {"vqa", "steps"} and scores.values["steps"] == 0
    finally:
        # `variants` lists the classes that are still there.
        del StepsTaken
        gc.collect()


def test_a_metric_of_several_scores_gives_the_named_ones_alone(world: Path) -> None:
    state = start(run(world, FLMConfig()))
    assert {"cloze", "next_word"} <= MetricScorer(replace(OPTIONS, caption_items=0)).score(
        state, tuned=False
    ).values.keys()
    scored = MetricScorer(replace(OPTIONS, scores=("cloze",))).score(state, tuned=False)
    assert scored.values.keys() == scored.errors.keys() == {"cloze"}
    assert scored.images == {"cloze": OPTIONS.cloze_items}


@pytest.mark.parametrize(
    "value, error, expected", [(0.0, 0.0, 0.0487), (1.0, 0.0, 0.0487), (0.5, 0.1, 0.1), (0.5, 0.0, 0.0)]
)
def test_a_share_at_an_end_is_not_certain(world: Path, value: float, error: float, expected: float) -> None:
    class Ends(Metric):
        scores = (Score("share", "Share", percent=True), Score("other", "Other"))

        def fits(self, state: TrainState) -> bool:
            return True

        def measure(self, state: TrainState) -> dict[str, float]:
            self.errors, self.images = dict.fromkeys(("share", "other"), error), {"share": 18, "other": 18}
            return {"share": value, "other": value}

    try:
        scored = MetricScorer(replace(OPTIONS, scores=("share", "other"))).score(start(run(world, ITMConfig())))
        # 1 of 20 is the share, with one item more at each end.
        assert scored.errors == {"share": pytest.approx(expected, abs=1e-4), "other": error}
    finally:
        # `variants` lists the classes that are still there.
        del Ends
        gc.collect()


def test_numbers_that_nobody_named_are_left_out(world: Path) -> None:
    class Both(Metric):
        scores = (Score("first", "First"), Score("second", "Second"))

        def fits(self, state: TrainState) -> bool:
            return True

        def measure(self, state: TrainState) -> dict[str, float]:
            self.errors = self.chance = self.blind = {"first": 0.1, "second": 0.2}
            return {"first": 1.0, "second": 2.0}

    try:
        scored = MetricScorer(replace(OPTIONS, scores=("second",))).score(start(run(world, ITMConfig())))
        assert scored.values == {"second": 2.0} and scored.errors == scored.chance == scored.blind == {"second": 0.2}
    finally:
        # `variants` lists the classes that are still there.
        del Both
        gc.collect()


def test_two_towers_are_scored_by_retrieval_alone(world: Path, tmp_path: Path) -> None:
    data = PairData(train=str(world / "train"), val=str(world / "val"), batch_size=4)
    run = TrainConfig(
        name="towers",
        data=data,
        model=two_towers(small_model(), width=16),
        objectives={"clip": CLIPConfig()},
        optim=OptimConfig(lr=1e-3),
        steps=1,
        vocab=200,
        precision="fp32",
        device="cpu",
        out=str(tmp_path),
    )
    state = start(run)
    scorer = MetricScorer(ScoringOptions())
    scores = scorer.score(state).values
    assert set(scores) == {"recall", "image_to_text/r1", "text_to_image/r1"}
    assert all(0 <= score <= 1 for score in scores.values())
    assert set(scorer.score(state).images.values()) == {8}
    assert scorer.samples({"towers": state}) == []
