"""A real comparison that was killed, is finished, or gets further arms."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import fastvlp
from fastvlp.cli import main
from fastvlp.comparison import arm_training, turns
from fastvlp.comparison.results import ArmRun, Comparison
from fastvlp.comparison.scoring import MetricScorer
from fastvlp.comparison.scoring_options import ScoringOptions
from fastvlp.comparison.summary import added_note
from fastvlp.data.world.corpus import WorldConfig, write_world
from fastvlp.errors import UserError
from fastvlp.model.saving import load_model
from fastvlp.objectives.flm import FLMConfig
from fastvlp.objectives.mlm import MLMConfig
from fastvlp.objectives.objective import ObjectiveConfig
from fastvlp.training.run_folder import locked
from fastvlp.training.train_config import TrainConfig
from tests.made_arms import Killed, small_config

OPTIONS = ScoringOptions(probe_steps=2, probe_batch=4, probe_items=20, cloze_items=4, pictures=2)
PLAN: dict[str, Any] = {"budget": "60s", "marks": (0.5,), "slice": "9s", "scoring": OPTIONS}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    write_world(folder, WorldConfig(), train=24, val=8, test=8, pairs=0, singles=0)
    return folder


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    count_readings(monkeypatch)


def count_readings(patch: pytest.MonkeyPatch) -> None:
    counted = SimpleNamespace(now=0.0)

    def read() -> float:
        counted.now += 1
        return counted.now

    for module in (turns, arm_training):
        patch.setattr(module, "time", SimpleNamespace(perf_counter=read, process_time=read, monotonic=read))


def arm(corpus: Path, name: str, objective: ObjectiveConfig, **more: Any) -> TrainConfig:
    return small_config(corpus, objective, name=name, vocab=60, **more)


def arms(corpus: Path) -> list[TrainConfig]:
    return [arm(corpus, "flm", FLMConfig()), arm(corpus, "mlm", MLMConfig(), ema=0.5)]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for run in sorted((folder / "runs").iterdir()):
        model = load_model(run, which="last").model
        found |= {f"{run.name}/{name}": value for name, value in model.state_dict().items()}
    return found


def measured(run: ArmRun) -> list[Any]:
    """All that does not depend on the machine."""
    marks = [(mark.share, mark.scores, mark.spent.steps, mark.spent.time) for mark in run.marks]
    curve = [(point.losses, point.spent.steps, point.spent.time) for point in run.curve]
    return [run.arm, run.seed, run.contents, run.failure, marks, curve]


def assert_equal(first: Path, second: Path) -> None:
    one, two = (Comparison.load(folder / "results.json") for folder in (first, second))
    assert [measured(run) for run in one.runs] == [measured(run) for run in two.runs]
    assert one.samples == two.samples and one.samples[0].questions[0].answers.keys() == {"flm", "mlm"}
    own, others = weights(first), weights(second)
    assert own.keys() == others.keys() and all(torch.equal(own[name], others[name]) for name in own)


def dies(monkeypatch: pytest.MonkeyPatch, where: type, name: str, at: int) -> None:
    """Lets the process end in the `at`-th call of a method, after half of it was done."""
    method, calls = getattr(where, name), iter(range(1, 1000))

    def once(*args: Any, **options: Any) -> Any:
        if next(calls) == at:
            raise Killed
        return method(*args, **options)

    monkeypatch.setattr(where, name, once)


@pytest.fixture(scope="module")
def whole(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A comparison that nobody interrupted."""
    with pytest.MonkeyPatch.context() as patch:
        count_readings(patch)
        folder = tmp_path_factory.mktemp("whole")
        fastvlp.compare(arms(corpus), out=folder, **PLAN)
        yield folder


@pytest.mark.parametrize(
    ("where", "name", "at"),
    [
        (arm_training.ArmTraining, "_step", 14),
        pytest.param(MetricScorer, "score", 3, marks=pytest.mark.slow),
        pytest.param(MetricScorer, "samples", 1, marks=pytest.mark.slow),
    ],
)
def test_a_killed_comparison_gives_the_same_weights(clock, whole, corpus, tmp_path, monkeypatch, where, name, at):
    with monkeypatch.context() as patch:
        dies(patch, where, name, at)
        with pytest.raises(Killed):
            fastvlp.compare(arms(corpus), out=tmp_path, **PLAN)
    assert not Comparison.load(tmp_path / "results.json").finished
    comparison = fastvlp.compare(resume=True, out=tmp_path)
    assert comparison.finished
    assert_equal(whole, tmp_path)
    assert not list(tmp_path.rglob("last.pt")) and not list(tmp_path.rglob("*.tmp"))


@pytest.fixture
def copied(whole: Path, tmp_path: Path) -> Path:
    """A finished comparison, in another place than where it was measured."""
    shutil.copytree(whole, tmp_path / "copied")
    return tmp_path / "copied"


def test_a_finished_comparison_trains_nothing_and_says_so(copied, capsys, monkeypatch):
    monkeypatch.setattr(turns, "begin_arm", None)
    before = {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()}
    assert main(["compare", "--resume", "--out", str(copied)]) == 0
    said = capsys.readouterr()
    assert "finished already" in said.err and "report.html" in said.out
    assert {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()} == before


def test_an_arm_is_added_to_a_finished_comparison(clock, copied, corpus):
    before = Comparison.load(copied / "results.json")
    late = arm(corpus, "late", MLMConfig(mask_rate=0.2))
    comparison = fastvlp.compare(add=[late], out=copied, set=["late:optim.lr=0.01"])
    assert comparison.arms == ["flm", "mlm", "late"] and [*comparison.added] == ["late"] and comparison.finished
    assert comparison.runs[:2] == before.runs and len(comparison.runs) == 3
    assert [mark.share for mark in comparison.runs[2].marks] == [0.5, 1.0]
    assert comparison.configs["late"]["tokenizer"] == str(copied / "tokenizer-flm.json")
    assert comparison.configs["late"]["optim"]["lr"] == 0.01 and comparison.settings["set"] == ["late:optim.lr=0.01"]
    for sample, earlier in zip(comparison.samples, before.samples, strict=True):
        assert sample.captions.keys() == earlier.captions.keys() and sample.picture == earlier.picture
        assert all({*asked.answers} == {"flm", "mlm", "late"} for asked in sample.questions)
    for text in ((copied / "report.html").read_text(), added_note(comparison)):
        assert text is not None and "late was added later" in text
    assert fastvlp.compare(resume=True, out=copied) == comparison
    for wrong, word in (([late], "late"), ([replace(late, name="flm")], "flm")):
        with pytest.raises(UserError, match=f"an arm {word} already"):
            fastvlp.compare(add=wrong, out=copied)


def test_other_data_cannot_be_added(copied, corpus):
    other = arm(corpus, "late", MLMConfig())
    data = replace(other.data, train=str(corpus / "test"))
    with pytest.raises(UserError, match=r"late.*data\.train"):
        fastvlp.compare(add=[replace(other, data=data)], out=copied)
    mixed = replace(other.data, mix={str(corpus / "test"): 0.5})
    with pytest.raises(UserError, match=r"late.*data\.mix"):
        fastvlp.compare(add=[replace(other, data=mixed)], out=copied)
    results = copied / "results.json"
    known = json.loads(results.read_text())
    known["runs"][0]["contents"]["train"] = "0123"
    results.write_text(json.dumps(known))
    with pytest.raises(UserError, match=r"train: has other records"):
        fastvlp.compare(add=[other], out=copied)


def test_arms_of_which_one_mixes_folders_are_compared(corpus, tmp_path):
    alone, mixed = arms(corpus)
    mixed = replace(mixed, data=replace(mixed.data, mix={str(corpus / "test"): 0.5}))
    options = {"scoring": replace(OPTIONS, scores=("cloze",), pictures=0), "budget": "1steps", "marks": (1.0,)}
    comparison = fastvlp.compare([alone, mixed], out=tmp_path, **options)
    one, two = (run.contents for run in comparison.runs)
    assert one["train"] != two["train"] and one["val"] == two["val"] and comparison.finished


def test_an_arm_without_a_checkpoint_ignores_the_tokenizer_of_an_earlier_run(corpus, tmp_path):
    config = replace(arm(corpus, "flm", FLMConfig()), out=str(tmp_path / "run"))
    state = turns.begin(config, resume=False)
    turns.keep(state)
    assert turns.begin(config, resume=True).tokenizer.vocab_size == state.tokenizer.vocab_size
    turns.forget(config.folder)
    assert (config.folder / "tokenizer.json").exists()
    assert turns.begin(replace(config, vocab=90), resume=True).tokenizer.vocab_size > state.tokenizer.vocab_size


def test_it_is_kept_that_a_comparison_goes_on_with_other_code(copied, monkeypatch):
    comparison = Comparison.load(copied / "results.json")
    comparison.finished, own = False, comparison.about["commit"]
    comparison.save(copied / "results.json")
    assert fastvlp.compare(resume=True, out=copied).continued == []
    comparison.about["commit"] = "older"
    comparison.save(copied / "results.json")
    for _ in range(2):
        ended = fastvlp.compare(resume=True, out=copied)
        assert [about["commit"] for about in ended.continued] == [own] and ended.about["commit"] == "older"
        ended.finished = False
        ended.save(copied / "results.json")
    assert f"commit {own}, not older" in (copied / "report.html").read_text()


def test_what_differs_from_the_comparison_is_refused(copied, corpus):
    before = (copied / "results.json").read_text()
    refused: list[tuple[dict[str, Any], str]] = [
        ({"budget": "61s"}, r"`budget` was \S+ \w+, not 61 s;"),
        ({"budget": "800steps"}, r"`budget` was \S+ \w+, not 800 steps;"),
        ({"seeds": 3}, "`seeds`"),
        ({"marks": (0.25, 0.75)}, "`marks`.*not 0.25 0.75;"),
        ({"slice": "4s"}, r"`slice` was \S+ \w+, not 4 s;"),
        ({"scoring": replace(OPTIONS, cloze_items=5)}, "`cloze_items`"),
        ({"set": ["optim.lr=0.5"]}, "`set`"),
        ({"threads": 37}, "`threads`"),
    ]
    for options, name in refused:
        with pytest.raises(UserError, match=name):
            fastvlp.compare(resume=True, out=copied, **options)
    one, two = arms(corpus)
    for recipes, name in (([one], "mlm"), ([one, replace(two, vocab=61)], r"mlm.*vocab")):
        with pytest.raises(UserError, match=name):
            fastvlp.compare(recipes, resume=True, out=copied)
    assert fastvlp.compare([two, one], resume=True, out=copied, **PLAN).finished
    assert (copied / "results.json").read_text() == before


def test_who_stops_a_comparison_reads_how_it_is_continued(copied, capsys, monkeypatch):
    def stopped(*args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    comparison = Comparison.load(copied / "results.json")
    comparison.finished = False
    comparison.save(copied / "results.json")
    monkeypatch.setattr("fastvlp.comparison.compare.run_comparison", stopped)
    assert main(["compare", "--resume", "--out", str(copied)]) == 130
    assert f"vlp compare --resume --out {copied}" in capsys.readouterr().err.replace("\n", "")


def test_where_there_is_nothing_to_continue_or_to_add_to(copied, corpus, tmp_path):
    late = arm(corpus, "late", MLMConfig())
    for options in ({"resume": True}, {"add": [late]}):
        with pytest.raises(UserError, match="holds no comparison"):
            fastvlp.compare(out=tmp_path / "new", **options)
    assert not (tmp_path / "new").exists()
    with pytest.raises(UserError, match=r"`resume`.*`add`"):
        fastvlp.compare(arms(corpus), out=copied)
    with pytest.raises(UserError, match=r"`resume`.*`add`"):
        fastvlp.compare(resume=True, add=[late], out=copied)
    with pytest.raises(UserError, match="ARM:vocab=9"):
        fastvlp.compare(add=[late], out=copied, set=["vocab=9"])
    with locked(copied), pytest.raises(UserError, match="another process"):
        fastvlp.compare(resume=True, out=copied)
    unfinished = Comparison.load(copied / "results.json")
    unfinished.finished = False
    unfinished.save(copied / "results.json")
    with pytest.raises(UserError, match="not finished"):
        fastvlp.compare(add=[late], out=copied)
    unfinished.about["device"] = "Another Processor, 2 cores"
    unfinished.save(copied / "results.json")
    with pytest.raises(UserError, match="Another Processor"):
        fastvlp.compare(resume=True, out=copied)
