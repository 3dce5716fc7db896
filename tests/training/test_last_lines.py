"""A contrastive run that has learned nothing says so."""

import json

import pytest

from fastvlp.training.loop import train
from fastvlp.training.optim import OptimConfig
from tests.training.runs import made_pairs, made_run


def chance_lines(run):
    lines = map(json.loads, (run.folder / "log.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == "chance"]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_loss_at_chance_is_named_at_the_end(tmp_path, capsys, accumulate):
    """A rate of nearly 0 leaves the loss where guessing among the rows of a step has it."""
    pairs = made_pairs(tmp_path / "pairs")
    run = made_run(
        pairs, tmp_path / "run", "clip", batch_size=8 // accumulate, accumulate=accumulate, optim=OptimConfig(lr=1e-12)
    )
    train(run)
    found = chance_lines(run)
    assert {line["term"] for line in found} <= {"clip/image", "clip/text"} and found
    assert all(line["chance"] == pytest.approx(2.0794, abs=1e-3) for line in found)
    assert "has learned nothing" in capsys.readouterr().out


def test_words_have_no_chance_that_is_known(tmp_path):
    run = made_run(made_pairs(tmp_path / "pairs"), tmp_path / "run", "mlm", optim=OptimConfig(lr=1e-12))
    train(run)
    assert not chance_lines(run)
