"""The time left counts scoring, and follows a machine that becomes busy."""

import io

import pytest
from rich.console import Console

from fastvlp.comparison.progress import RECENT, ROW_TO_PAIR, ProgressDisplay
from fastvlp.comparison.results import ArmRun, Measurement, TrainingCost


def display_of(**options) -> ProgressDisplay:
    quiet = Console(file=io.StringIO(), force_terminal=False)
    return ProgressDisplay(["flm"], budget_s=100, seeds=1, scorings=4, console=quiet, **options)


def spent(time: float, wall: float, pairs: int) -> TrainingCost:
    return TrainingCost(time=time, wall=wall, pairs=pairs)


def test_it_is_guessed_from_the_pairs_before_anything_was_scored():
    display, run = display_of(tuning_rows=500), ArmRun(arm="flm", seed=0)
    display.trained(run, spent(20, 40, 1000), 20)
    # 80 s of training at half a core, and 500 rows at 25 a second.
    assert display.left_s == pytest.approx(2 * 80 + 20 * ROW_TO_PAIR)


def test_scorings_take_as_long_as_those_before():
    display, run = display_of(tuning_rows=500), ArmRun(arm="flm", seed=0)
    display.trained(run, spent(25, 25, 1000), 25)
    mark = Measurement(share=0.25, spent=spent(25, 25, 1000), scores={}, scoring_s=3.0)
    display.scored(run, mark, tuned=False)
    # Two more cheap ones; the fine-tuning and its cheap scores.
    assert display.left_s == pytest.approx(75 + 2 * 3 + 12.5 * ROW_TO_PAIR + 3)
    display.scored(run, mark, tuned=True)
    assert display.left_s == pytest.approx(75 + 2 * 3)


def test_the_pace_is_that_of_the_last_turns():
    display, run = display_of(tuning_rows=0), ArmRun(arm="flm", seed=0)
    for turn in range(1, RECENT + 1):
        display.trained(run, spent(turn, turn, 10 * turn), turn)
    assert display.pace == pytest.approx(1.0)
    for turn in range(1, RECENT + 1):
        display.trained(run, spent(RECENT + turn, RECENT + 4 * turn, 10 * turn), RECENT + turn)
    assert display.pace == pytest.approx(4.0)


def test_the_last_scoring_is_announced():
    display, run = display_of(tuning_rows=500), ArmRun(arm="flm", seed=0)
    display.trained(run, spent(100, 100, 1000), 100)
    display.scoring(run, 1.0)
    assert f"about {50 * ROW_TO_PAIR:.0f} s left" in display.console.file.getvalue()
