"""Fine-tuning and scoring on stored states of a frozen image encoder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from fastvlp.data.state_store import StatesConfig
from fastvlp.data.states_file import StatesFile
from fastvlp.model.encoders.vit import ViT
from fastvlp.tasks.interface import NoOptions
from fastvlp.tasks.task_evaluation import evaluate_task, load_task, score_split
from fastvlp.training.loop import start, steps, train
from tests.tasks.tuning import planned, tune

FP32 = StatesConfig(store="always", dtype="fp32")
NEVER = StatesConfig(store="never")


@pytest.mark.slow
@pytest.mark.parametrize("task", ["vqa", "retrieval", "grounding", "caption", "entailment", "nlvr2"])
def test_losses_are_those_of_encoding_at_each_step(runs, world, tmp_path, task):
    """Questions, and pairs of images too, of which each has its own states."""
    run = planned(task, runs["mlm"], world, tmp_path / "run", steps=3, freeze=("image",))
    losses = {}
    for states in (FP32, NEVER):
        state = start(replace(run, states=replace(states, folder=str(tmp_path / "states"))))
        losses[states.store] = [report.losses for report in steps(state)]
        assert (state.stored is None) == (states is NEVER)
    assert losses["always"] == losses["never"]
    entries = {len(StatesFile(path)) for path in (tmp_path / "states").iterdir()}
    assert entries == ({32, 8} if task == "nlvr2" else {24, 4})


@pytest.mark.slow
@pytest.mark.parametrize("task", ["vqa", "retrieval"])
def test_scores_are_those_of_the_images(runs, world, tmp_path, task):
    run = planned(task, runs["mlm"], world, tmp_path / "run", steps=6, freeze=("image",))
    run = replace(run, states=replace(FP32, folder=str(tmp_path / "states")))
    train(run)
    tuned = load_task(run.folder)
    assert tuned.stored is not None
    options = {"device": "cpu", "options": NoOptions(), "split": "test"}
    stored = score_split(tuned, str(world / "test"), **options)
    assert len([*(tmp_path / "states").iterdir()]) == 3
    assert stored == score_split(tuned._replace(stored=None), str(world / "test"), **options)


@pytest.mark.slow
def test_the_command_stores_and_scores(runs, world, tmp_path, monkeypatch):
    """The training images are encoded once, however often they are read; what is scored again is not."""
    counted = 0
    forward = ViT.forward

    def counting(self, image, keep_BK=None):
        nonlocal counted
        counted += len(image)
        return forward(self, image, keep_BK)

    monkeypatch.setattr(ViT, "forward", counting)
    tune("vqa", runs["mlm"], world, tmp_path / "run", steps=12, freeze=("image",))
    # The splits, one of each opened again for scoring, and a blank image whose states are checked at the start.
    assert counted == 24 + 4 + 6 + 1 + 1
    evaluate_task(str(tmp_path / "run"))
    assert counted == 24 + 4 + 6 + 1 + 1 + 1
    for path in Path(world).rglob("states-*"):
        path.unlink()
