"""Batches of rows of one length: said where an objective tells their rows apart."""

from dataclasses import replace
from pathlib import Path

import pytest

from fastvlp.training.loop import train
from tests.training.runs import made_pairs, made_run


@pytest.mark.parametrize(("objective", "said"), [("flm", False), ("clip", True)])
def test_wrong_texts_as_long_as_the_right_one_are_named(
    objective: str, said: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = made_run(made_pairs(tmp_path / "data"), tmp_path / "run", objective, steps=1)
    train(replace(run, data=replace(run.data, group=16)))
    assert ("`data.group`" in capsys.readouterr().out) == said
