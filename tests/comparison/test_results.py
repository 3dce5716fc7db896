"""Time-to-quality and its spread, on curves whose answer can be read off."""

import json
from pathlib import Path

import pytest

from fastvlp.comparison.results import ArmRun, Comparison, Measurement, TrainingCost
from fastvlp.comparison.summary import (
    Reached,
    exact_duration,
    first_reached,
    format_duration,
    format_score,
    format_speedup,
    known_score,
    measured_scores,
    speedup,
    spread,
    summarise,
    within_noise,
)
from fastvlp.errors import UserError
from tests.comparison.made_results import comparison_of

VQA = known_score("vqa")


def run(arm: str, seed: int, scores: list[float]) -> ArmRun:
    times = [10.0, 20.0, 40.0]
    marks = [
        Measurement(
            share=t / 40,
            spent=TrainingCost(time=t, cpu=2 * t, steps=int(t), pairs=int(8 * t), tokens=int(80 * t)),
            scores={"vqa": s},
        )
        for t, s in zip(times, scores)
    ]
    return ArmRun(arm=arm, seed=seed, marks=marks)


def test_the_curve_is_straight_between_marks() -> None:
    assert first_reached([10, 20], [0.2, 0.4], 0.3) == Reached(15, False)
    assert first_reached([10, 20, 40], [0.2, 0.4, 0.3], 0.4) == Reached(20, False)
    assert first_reached([10, 20], [0.2, 0.4], 0.5) is None


def test_a_score_had_at_the_first_mark_is_a_bound() -> None:
    assert first_reached([10, 20], [0.6, 0.7], 0.5) == Reached(10, True)
    comparison = comparison_of(run("mlm", 0, [0.1, 0.2, 0.5]), run("flm", 0, [0.6, 0.7, 0.8]))
    assert str(speedup(comparison, "flm", "vqa")) == "≥ 4.00×"


def test_speedups_are_taken_seed_by_seed() -> None:
    comparison = comparison_of(
        run("mlm", 0, [0.1, 0.2, 0.5]),
        run("flm", 0, [0.4, 0.6, 0.8]),  # at 15 s: 40 / 15
        run("mlm", 1, [0.1, 0.2, 0.4]),
        run("flm", 1, [0.2, 0.4, 0.8]),  # at 20 s: 40 / 20
    )
    speed = speedup(comparison, "flm", "vqa")
    assert speed.ratio is not None
    assert speed.ratio.mean == pytest.approx((40 / 15 + 2) / 2)
    assert (speed.reached, speed.n, speed.at_least) == (2, 2, False)
    assert format_speedup(comparison, "mlm", "vqa") == "1"


def test_seeds_that_never_get_there_are_counted() -> None:
    low, high = run("ar", 0, [0.1, 0.2, 0.3]), run("ar", 1, [0.1, 0.4, 0.6])
    comparison = comparison_of(run("mlm", 0, [0.1, 0.2, 0.4]), run("mlm", 1, [0.1, 0.2, 0.4]), low, high)
    assert str(speedup(comparison, "ar", "vqa")) == "2.00× (1 of 2 seeds)"
    assert str(speedup(comparison_of(run("mlm", 0, [0.1, 0.2, 0.4]), low), "ar", "vqa")) == "not reached"


def test_the_reference_that_falls_back_is_timed_by_its_first_reach() -> None:
    comparison = comparison_of(run("mlm", 0, [0.2, 0.6, 0.4]), run("flm", 0, [0.4, 0.6, 0.8]))
    speed = speedup(comparison, "flm", "vqa")
    assert speed.ratio is not None and speed.ratio.mean == pytest.approx(15 / 10)


def test_a_reference_that_is_done_at_once_cannot_be_timed() -> None:
    comparison = comparison_of(run("mlm", 0, [0.5, 0.5, 0.5]), run("flm", 0, [0.4, 0.6, 0.8]))
    assert str(speedup(comparison, "flm", "vqa")) == "-"


def test_rates_are_over_training_time() -> None:
    row = summarise(comparison_of(run("mlm", 0, [0.1, 0.2, 0.5]), run("mlm", 1, [0.1, 0.2, 0.7])))[0]
    assert (row.steps, row.pairs_per_s, row.tokens_per_s, row.cpu) == (40, 8, 80, 2)
    assert row.final("vqa") == spread([0.5, 0.7])


def test_an_unfinished_run_has_gaps() -> None:
    broken = run("mlm", 0, [0.1])
    broken.failure = "not finite"
    row = summarise(comparison_of(broken))[0]
    assert row.scores["vqa"][1:] == [None, None]
    assert row.failures == ["seed 0: not finite"]
    assert format_score(VQA, row.scores["vqa"][2]) == "-"


def test_numbers_for_reading() -> None:
    assert format_score(VQA, spread([0.5])) == "50.0 %"
    assert format_score(VQA, spread([0.5, 0.6])) == "55.0 ± 7.1 %"
    assert format_score(known_score("cider"), spread([0.51234])) == "0.512"
    assert [format_duration(s) for s in (15, 60, 120, 7200)] == ["15 s", "60 s", "2 min", "2 h"]
    exact = {15: "15 s", 99.5: "99.5 s", 90: "90 s", 150: "2.5 min", 5400: "90 min", 7201: "7201 s", 9000: "2.5 h"}
    assert [exact_duration(s) for s in exact] == [*exact.values()]


def test_results_are_read_back_as_they_were(tmp_path: Path) -> None:
    comparison = comparison_of(run("mlm", 0, [0.1, 0.2, 0.5]))
    comparison.save(tmp_path / "results.json")
    again = Comparison.load(tmp_path / "results.json")
    assert again == comparison and again.folder == tmp_path
    content = json.loads((tmp_path / "results.json").read_text())
    assert {*content} == {
        "arms", "reference", "budget_s", "seeds", "shares", "about", "settings", "configs", "runs", "samples", "chance",
        "blind", "images", "finished", "sampled", "added", "continued", "clock", "counted",
    }  # fmt: skip
    assert {*content["runs"][0]} == {"arm", "seed", "marks", "curve", "dropped", "failure", "contents"}
    assert {*content["runs"][0]["marks"][0]} == {"share", "spent", "scores", "errors", "scoring_s"}


def test_comparisons_of_earlier_versions_are_read() -> None:
    for path in sorted((Path(__file__).parents[2] / "bench" / "results").glob("compare_*.json")):
        comparison = Comparison.load(path)
        assert comparison.runs and summarise(comparison) and measured_scores(comparison), path


def test_noise_is_the_spread_over_seeds() -> None:
    a, b, c = spread([0.5, 0.6]), spread([0.6, 0.7]), spread([0.9, 0.91])
    assert a and b and c and within_noise(a, b) and not within_noise(b, c)
    one, other = spread([0.5]), spread([0.9])
    assert one and other and within_noise(one, other), "nobody knows how much single runs differ"
    # Of single runs the standard error over their items counts.
    one, other = spread([0.5], 0.004), spread([0.51], 0.004)
    assert one and other and within_noise(one, other) and not within_noise(one, other._replace(mean=0.512))
    assert format_score(VQA, one) == "50.0 ± 0.4 %"


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"results\.json"):
        Comparison.load(tmp_path / "results.json")
    (tmp_path / "results.json").write_text('{"arms": 3}')
    with pytest.raises(UserError, match=r"results\.json"):
        Comparison.load(tmp_path / "results.json")
