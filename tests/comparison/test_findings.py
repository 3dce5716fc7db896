"""Findings of a comparison, in sentences whose numbers can be read off the curves."""

from dataclasses import replace

import pytest

from fastvlp.comparison.findings import differences, findings
from fastvlp.comparison.results import ArmRun, Measurement, TrainingCost
from fastvlp.comparison.summary import speedup
from tests.comparison.made_results import comparison_of

TIMES = (10.0, 20.0, 40.0)


def run(arm: str, scores: list[float], *, seed: int = 0, error: float | None = 0.01) -> ArmRun:
    marks = [
        Measurement(
            share=time / 40,
            spent=TrainingCost(time=time),
            scores={"cloze": score},
            errors={} if error is None else {"cloze": error},
        )
        for time, score in zip(TIMES, scores)
    ]
    return ArmRun(arm=arm, seed=seed, marks=marks)


def test_the_time_of_a_single_run_has_an_interval_by_the_errors_of_its_scores():
    comparison = comparison_of(run("flm", [0.2, 0.6, 0.8]), run("mlm", [0.1, 0.2, 0.5]))
    speed = speedup(comparison, "flm", "cloze")
    around = 2 * 0.01 * 2**0.5
    assert speed.shares == (pytest.approx(17.5 / 40),)
    assert speed.interval == (
        pytest.approx((17.5 - around * 25) / 40),
        pytest.approx((17.5 + around * 25) / 40),
    )
    first, *rest = findings(comparison)
    assert "flm reached" in first and "in 0.44 of its time (0.42 to 0.46" in first
    assert len(rest) == 1 and "flm 80.0 ± 1.0 % leads mlm 50.0 ± 1.0 %" in rest[0]


def test_nothing_is_said_of_a_time_that_the_errors_leave_open():
    comparison = comparison_of(run("flm", [0.2, 0.4, 0.51]), run("mlm", [0.1, 0.2, 0.5]))
    (only,) = findings(comparison)
    assert "no winner" in only


def test_nothing_is_said_of_the_time_of_an_arm_that_lost_the_score_again():
    for final, sentences in ((0.49, 1), (0.5, 2)):
        comparison = comparison_of(run("flm", [0.2, 0.8, final]), run("mlm", [0.1, 0.2, 0.5]))
        assert len(findings(comparison)) == sentences, final


def test_of_seeds_the_mean_has_to_keep_the_score():
    reference = [run("mlm", [0.1, 0.2, 0.5], seed=seed) for seed in (0, 1)]
    for final, sentences in ((0.1, 1), (0.4, 2)):
        arm = [run("flm", [0.2, 0.8, 0.6]), run("flm", [0.2, 0.8, final], seed=1)]
        assert len(findings(comparison_of(*reference, *arm))) == sentences, final


def test_without_errors_there_is_neither_a_time_nor_a_winner():
    comparison = comparison_of(run("flm", [0.2, 0.6, 0.8], error=None), run("mlm", [0.1, 0.2, 0.5], error=None))
    (only,) = findings(comparison)
    assert "no winner" in only


def test_few_images_are_said_to_say_little():
    comparison = comparison_of(run("mlm", [0.1, 0.2, 0.5]))
    comparison.images = {"cloze": 100}
    assert len(findings(comparison)) == 1
    comparison.images = {"cloze": 18}
    assert findings(comparison)[1:] == ["Only 18 images were scored: so few say little."]
    comparison.runs[0].marks[-1].scores["vqa"] = 0.5
    comparison.images = {"cloze": 500, "vqa": 20}
    assert findings(comparison)[-1] == "Few images were scored, and so few say little: 20 for VQA accuracy."


def test_over_seeds_the_interval_is_their_range():
    comparison = comparison_of(
        *(run("mlm", [0.1, 0.2, 0.5], seed=seed) for seed in (0, 1)),
        run("flm", [0.4, 0.6, 0.8]),
        run("flm", [0.1, 0.5, 0.8], seed=1),
    )
    assert "in 0.44 of its time (0.38 to 0.50 over 2 seeds)" in findings(comparison)[0]


def test_those_that_do_not_get_there_share_a_sentence():
    comparison = comparison_of(*(run(arm, [0.1, 0.2, 0.3]) for arm in ("ar", "prefixlm")), run("mlm", [0.1, 0.2, 0.5]))
    assert findings(comparison)[0].startswith("ar and prefixlm did not reach")


def test_chance_and_what_the_text_alone_gives_stand_beside_the_scores():
    comparison = comparison_of(run("mlm", [0.1, 0.2, 0.5]))
    comparison.chance, comparison.blind = {"cloze": 0.05}, {"cloze": 0.3}
    assert "30.0 %" in findings(comparison)[-1] and "5.0 %" in findings(comparison)[-1]


def test_nothing_is_found_before_the_first_score():
    assert findings(comparison_of(replace(run("mlm", [])))) == []


def test_arms_differ_in_parts_of_their_configs():
    comparison = comparison_of(run("flm", [0.2]), run("mlm", [0.1]))
    assert differences(comparison) == ["objectives"]
    comparison.configs["mlm"]["data"] = {"train": "b"}
    assert differences(comparison) == ["objectives", "data.train"]
