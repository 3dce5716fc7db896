"""Distillation: its formulas against loops, and that a student reads what its teacher computes."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastvlp.data.reader import RecordReader
from fastvlp.data.records.shards import Shards
from fastvlp.data.records.transform import Transform
from fastvlp.errors import UserError
from fastvlp.model.saving import load_model
from fastvlp.model.sizes import joint_space
from fastvlp.objectives.clip import CLIPConfig
from fastvlp.objectives.distil import (
    FeatureDistilConfig,
    SimilarityDistilConfig,
    learned_scale,
    similarity_divergence,
    squared_distance,
)
from fastvlp.training.loop import start, steps, train, validate
from fastvlp.training.train_config import TrainConfig
from tests.training.runs import assert_equal, made_pairs, made_records, made_run, weights


def unit_rows(rows: int, width: int, seed: int) -> torch.Tensor:
    x = torch.randn(rows, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return x / x.norm(dim=1, keepdim=True)


def test_the_distance_is_that_of_each_pair_of_numbers():
    student, teacher = unit_rows(3, 5, 0), unit_rows(3, 5, 1)
    known = [sum((float(a) - float(b)) ** 2 for a, b in zip(*rows)) for rows in zip(student, teacher)]
    assert squared_distance(student, teacher).tolist() == pytest.approx(known, rel=1e-12)


def test_the_divergence_is_that_of_two_distributions_over_all_keys():
    query, key, teacher_query, teacher_key = (
        unit_rows(3, 5, 0),
        unit_rows(4, 5, 1),
        unit_rows(3, 7, 2),
        unit_rows(4, 7, 3),
    )
    scale = torch.tensor(6.0, dtype=torch.float64, requires_grad=True)
    known = []
    for b in range(3):
        own = [math.exp(6.0 * float(query[b] @ key[m])) for m in range(4)]
        wanted = [math.exp(9.0 * float(teacher_query[b] @ teacher_key[m])) for m in range(4)]
        p, q = [x / sum(wanted) for x in wanted], [x / sum(own) for x in own]
        known.append(sum(p[m] * math.log(p[m] / q[m]) for m in range(4)))
    found = similarity_divergence(query, key, teacher_query, teacher_key, scale, 9.0)
    assert found.tolist() == pytest.approx(known, rel=1e-10)
    found.sum().backward()
    step = 1e-6
    moved = [similarity_divergence(query, key, teacher_query, teacher_key, scale + d, 9.0).sum() for d in (step, -step)]
    assert scale.grad.item() == pytest.approx((moved[0] - moved[1]).item() / (2 * step), rel=1e-6)


def test_a_student_that_equals_its_teacher_has_nothing_to_learn():
    image, text = unit_rows(4, 5, 0).requires_grad_(), unit_rows(4, 5, 1)
    scale = torch.tensor(9.0, dtype=torch.float64)
    loss = similarity_divergence(image, text, image.detach(), text, scale, 9.0).sum()
    loss = loss + squared_distance(image, image.detach()).sum()
    (grad,) = torch.autograd.grad(loss, image)
    assert abs(loss.item()) < 1e-12 and grad.abs().max() < 1e-12


@pytest.fixture(scope="module")
def taught(tmp_path_factory) -> Path:
    """A folder with pairs, and a teacher of another width, image size and tokenizer."""
    folder = tmp_path_factory.mktemp("taught")
    run = made_run(made_pairs(folder / "pairs"), folder / "teacher", "clip", steps=2, vocab=80)
    model = replace(run.model, image=replace(run.model.image, size=24), embed=joint_space(run.model, width=20))
    train(replace(run, model=model))
    return folder


def student(taught: Path, out: Path, **changes) -> TrainConfig:
    teacher = str(taught / "teacher")
    objectives = {
        "clip": CLIPConfig(),
        "features": FeatureDistilConfig(teacher=teacher),
        "similarities": SimilarityDistilConfig(teacher=teacher),
    }
    run = made_run(taught / "pairs", out, "clip", steps=3)
    return replace(
        run, **{"objectives": objectives, "states": replace(run.states, folder=str(out / "states")), **changes}
    )


def test_a_batch_brings_what_the_teacher_computes(taught: Path, tmp_path: Path):
    state = start(student(taught, tmp_path))
    batch, _ = next(state.train.batches(start=0))
    teacher = load_model(taught / "teacher")
    records, reader = made_records(24), RecordReader(Shards(str(taught / "pairs" / "train")), Transform(size=24))
    pixels = torch.stack([reader.record(i).images[0] for i in range(24)])
    vectors = teacher.model.embed_image(teacher.model.encode_image(pixels))
    captions = [text for record in records for text in record.info["captions"]]
    texts = teacher.model.embed_text(*teacher.tokenizer.encode(captions, 16))
    for image, text in zip(batch.teacher_image, batch.teacher_text):
        i = int((vectors - image).norm(dim=1).argmin())
        torch.testing.assert_close(image, vectors[i], rtol=0, atol=2e-3)
        # One of the two captions of the same record.
        assert (texts[2 * i : 2 * i + 2] - text).norm(dim=1).min() < 5e-3


def test_it_trains_validates_and_computes_the_teacher_once(taught: Path, tmp_path: Path):
    run = student(taught, tmp_path)
    state = start(run)
    teacher = state.stored.teacher
    assert sum(note.seconds for note in teacher.images.store.notes) > 0 and teacher.trained_s is not None
    terms = {"features/image", "features/text", "similarities/image", "similarities/text"}
    assert terms < {*next(steps(state)).losses} and terms < {*validate(state)}
    again = start(replace(run, out=str(tmp_path / "again")))
    assert sum(note.seconds for note in again.stored.notes) == 0
    # Nothing of distillation is needed after training but its temperature.
    train(replace(run, out=str(tmp_path / "whole")))
    assert {*load_model(tmp_path / "whole").objectives} == {"clip.log_scale", "similarities.log_scale"}
    events = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    (told,) = [event for event in events if event["kind"] == "teacher"]
    assert told["trained_s"] == teacher.trained_s
    # Found where an earlier run wrote it.
    assert told["computing_s"] == pytest.approx(sum(teacher.computing_s), abs=0.01) and told["computing_s"] > 0


def test_the_teachers_time_may_be_taken_off_the_runs(taught: Path, tmp_path: Path):
    run = student(taught, tmp_path, steps=None, budget_s=1000.0, teacher_time="counted")
    state = start(run)
    assert state.run.budget_s == pytest.approx(1000 - state.stored.teacher.seconds)
    assert start(replace(run, teacher_time="free")).run.budget_s == 1000
    for changes in ({"budget_s": 1e-9}, {"budget_s": None, "steps": 3}):
        with pytest.raises(UserError, match="teacher_time"):
            start(replace(run, **changes))


def test_micro_batches_are_one_batch(taught: Path, tmp_path: Path):
    whole = student(taught, tmp_path / "whole", steps=2)
    parts = student(taught, tmp_path / "parts", steps=2, accumulate=2, data=replace(whole.data, batch_size=4))
    assert_equal(weights(train(whole)), weights(train(parts)), 1e-5)


def test_the_teachers_temperature_is_the_one_that_it_learned(taught: Path):
    known = float(load_model(taught / "teacher").objectives["clip.log_scale"].exp())
    assert learned_scale(str(taught / "teacher")) == pytest.approx(known)


def test_the_temperature_is_read_without_the_model(taught: Path, monkeypatch):
    monkeypatch.setattr("fastvlp.model.saving.VLModel", None)
    assert learned_scale(str(taught / "teacher")) > 1


def test_a_run_names_the_teacher_of_all_its_objectives(taught: Path, tmp_path: Path):
    run = student(taught, tmp_path)
    elsewhere = {name: own.with_teacher(str(taught / "no")) for name, own in run.objectives.items()}
    state = start(replace(run, objectives=elsewhere, teacher=str(taught / "teacher")))
    assert state.run.objectives == run.objectives
    assert state.stored.teacher is not None


def test_what_cannot_teach_is_named(taught: Path, tmp_path: Path):
    run = student(taught, tmp_path)
    other = str(tmp_path / "other")
    train(made_run(taught / "pairs", tmp_path / "other", "mlm", steps=1))
    with pytest.raises(UserError, match="joint space"):
        start(replace(run, objectives={"features": FeatureDistilConfig(teacher=other)}))
    two = {**run.objectives, "similarities": SimilarityDistilConfig(teacher=str(taught / "no"))}
    with pytest.raises(UserError, match="no"):
        start(replace(run, objectives=two))
    mlm = replace(run, model=replace(run.model, embed=None), objectives={"features": run.objectives["features"]})
    with pytest.raises(UserError, match="joint space"):
        start(mlm)
