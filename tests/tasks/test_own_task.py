"""A task in a user's own file: fine-tuned and scored without a change to the package."""

import json
import os
import subprocess
import sys
from dataclasses import fields
from inspect import signature

import pytest

from fastvlp.cli import main
from fastvlp.data.records.shards import Shards
from fastvlp.errors import UserError
from fastvlp.tasks.finetune import finetune
from fastvlp.tasks.interface import make_task, task_named, tasks
from fastvlp.tasks.task_evaluation import evaluate_task
from tests.tasks.tuning import planned, tune

OWN_TASK = '''
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from fastvlp.objectives.objective import Loss
from fastvlp.tasks.heads import HeadConfig, HeadObjective, image_states, target_of
from fastvlp.tasks.interface import Task
from fastvlp.tasks.item_data import ItemData
from fastvlp.tasks.items import read_items


@dataclass(frozen=True, kw_only=True)
class YesNoData(ItemData):
    questions: str = "questions"

    def read(self, shards):
        items = read_items(shards, self.questions, "question", "answers")
        return [item for item in items if not item.text or item.entry["answers"].keys() <= {"yes", "no"}]

    def target(self, items):
        return torch.tensor([item.entry["answers"].get("yes", 0.0) for item in items])


@dataclass(frozen=True, kw_only=True)
class YesNoConfig(HeadConfig):
    yes_weight: float

    def build(self, model, tokenizer):
        return YesNo(self, model)


class YesNo(HeadObjective):
    def __init__(self, config, model):
        super().__init__(config, model, images=1, outputs=1)
        self.yes_weight = config.yes_weight

    def counts(self, batch):
        return {"yes": torch.tensor(len(batch), device=batch.ids.device)}

    def forward(self, model, image_BKD, batch):
        logits, target = self.logits(model, image_BKD, batch)[:, 0], target_of(batch)
        weight = 1 + (self.yes_weight - 1) * target
        total = F.binary_cross_entropy_with_logits(logits, target, weight, reduction="sum")
        return {"yes": Loss(total, self.counts(batch)["yes"])}


@dataclass(frozen=True, kw_only=True)
class Threshold:
    threshold: float = 0.5
    """Probability of yes from which the answer is yes."""


@dataclass(frozen=True, kw_only=True)
class YesNoTask(Task):
    """Yes or no?"""

    name, data, config, field, answer = "yes_no", YesNoData, YesNoConfig, "questions", "answers"
    scoring = Threshold

    yes_weight: float = 1.0
    """How much more a yes counts than a no."""

    @classmethod
    def score(cls, tuned, split, options):
        model, right = tuned.saved.model, []
        for batch in tuned.batches(split):
            logits = tuned.objective.logits(model, image_states(model, batch), batch)[:, 0]
            right += (logits.sigmoid() >= options.threshold).eq(target_of(batch) > 0.5).tolist()
        return {"accuracy": sum(right) / len(right), "count": float(len(right))}
'''


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("own") / "yes_no_task.py"
    path.write_text(OWN_TASK)
    return path


@pytest.mark.slow
def test_it_works_from_the_command_line_and_in_python(file, runs, world, tmp_path, capsys):
    out, own = tmp_path / "run", ["--import", str(file)]
    places = ["--from", str(runs["mlm"]), "--data", str(world), "--out", str(out)]
    short = ["--steps", "2", "--batch-size", "8", "--precision", "fp32"]
    assert main([*own, "finetune", "yes_no", *places, *short, "--yes-weight", "3"]) == 0
    scores = json.loads((out / "results.json").read_text())
    answers = [q["answers"].keys() for record in Shards(world / "test") for q in record.info["questions"]]
    assert scores["test"]["count"] == sum(keys <= {"yes", "no"} for keys in answers) > 1
    assert json.loads((out / "model.json").read_text())["info"]["objectives"]["yes_no"]["yes_weight"] == 3.0

    assert main([*own, "evaluate", str(out)]) == 0
    assert json.loads((out / "results-2.json").read_text()) == {"test": scores["test"]}
    assert evaluate_task(str(out), threshold=0.0).scores["test"]["accuracy"] == pytest.approx(
        sum("yes" in keys for keys in answers if keys <= {"yes", "no"}) / scores["test"]["count"]
    )
    assert main([*own, "evaluate", str(out), "--threshold", "0"]) == 0
    assert main([*own, "evaluate", str(out), "--beams", "3"]) == 2
    assert "--beams" in capsys.readouterr().err

    again = tune("yes_no", runs["mlm"], world, tmp_path / "again", yes_weight=3)
    assert {name: again.scores["test"][name] for name in ("accuracy", "count")} == {
        name: scores["test"][name] for name in ("accuracy", "count")
    }
    task = task_named("yes_no")(yes_weight=3.0)
    assert planned(task, runs["mlm"], world, tmp_path / "third").objectives["yes_no"].yes_weight == 3.0

    # A process that has not read the file says so.
    alone = subprocess.run(
        [sys.executable, "-m", "fastvlp", "evaluate", str(out)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert alone.returncode == 2 and "yes_no" in alone.stderr and "--import" in alone.stderr


def test_help_lists_the_tasks_and_the_options_of_one(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["finetune", "--help"])
    listed = capsys.readouterr().out
    assert ended.value.code == 0 and all(f"  {task.name}" in listed for task in tasks())
    with pytest.raises(SystemExit):
        main(["finetune", "grounding", "--help"])
    own = capsys.readouterr().out
    assert all(option in own for option in ("--from", "--steps", "--layers", "--reduction")) and "--anchors" not in own


def test_an_option_of_another_task_is_an_error(runs, world, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["finetune", "nlvr", "--from", str(runs["mlm"]), "--data", str(world), "--answers", "3"])
    assert ended.value.code == 2 and "--answers" in capsys.readouterr().err
    with pytest.raises(UserError, match="`answers` is no option of nlvr2; it has `form`"):
        make_task("nlvr2", {"answers": 3})
    assert main(["finetune", "vqb"]) == 2
    assert "did you mean vqa" in capsys.readouterr().err


def test_own_options_do_not_hide_those_that_all_tasks_have():
    shared = {*signature(finetune).parameters}
    assert not [f"{task.name}: {field.name}" for task in tasks() for field in fields(task) if field.name in shared]
