"""Metrics of compositional benchmarks against loops over the items, and their behaviour for ties and NaN."""

from __future__ import annotations

import math

import pytest
import torch

from fastvlp.eval.composition import (
    WINOGROUND_CHANCE,
    auc,
    best_threshold,
    is_above,
    macro_error,
    median_threshold,
    winoground_hits,
)
from fastvlp.eval.sugarcrepe import sugarcrepe_scores
from fastvlp.eval.uncertainty import standard_error


def random_scores(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_winoground_against_its_definition():
    score = random_scores(200, 2, 2)
    hits = winoground_hits(score)
    for i, s in enumerate(score.tolist()):
        text = s[0][0] > s[0][1] and s[1][1] > s[1][0]
        image = s[0][0] > s[1][0] and s[1][1] > s[0][1]
        assert [bool(hits[name][i]) for name in ("text", "image", "group")] == [text, image, text and image]


def test_winoground_of_random_scores_is_at_chance():
    hits = winoground_hits(random_scores(20_000, 2, 2, seed=1))
    for name, chance in WINOGROUND_CHANCE.items():
        assert float(hits[name].double().mean()) == pytest.approx(chance, abs=0.012)


@pytest.mark.parametrize("value", [0.0, math.nan])
def test_equal_scores_answer_nothing(value: float):
    same = torch.full((3, 2, 2), value)
    assert not any(bool(hit.any()) for hit in winoground_hits(same).values())
    assert not bool(is_above(same, same).any())


def test_a_difference_of_rounding_is_none():
    assert is_above(torch.tensor([1.0, 1.0]), torch.tensor([1.0 - 5e-7, 0.9]), tie=1e-6).tolist() == [False, True]


def test_sugarcrepe_by_kind_and_overall():
    hit = torch.tensor([1, 0, 1, 1, 1, 0], dtype=torch.bool)
    kinds, images = ["swap_obj"] * 2 + ["add_att"] * 4, [0, 1, 2, 3, 4, 4]
    scores, errors = sugarcrepe_scores(hit, kinds, images)
    assert scores == pytest.approx({"add_att": 0.75, "swap_obj": 0.5, "overall": 4 / 6, "macro": 0.625})
    # The last two items are on one image, so they count as one draw.
    assert errors["add_att"] == pytest.approx(standard_error([1, 1, 1, 0], [2, 3, 4, 4]))
    assert errors.keys() == scores.keys()
    _, single = sugarcrepe_scores(torch.tensor([True]), ["add_att"], [0])
    assert single == {}, "one item has no standard error"


def test_the_error_of_a_macro_mean():
    values = [1.0, 0.0, 1.0, 1.0, 0.0, 0.0, 1.0]
    one_kind = macro_error(values, ["a"] * 7, range(7))
    assert one_kind == pytest.approx(standard_error(values))
    # Independent kinds of equal size: variances add up, up to the factor n / (n - 1) of each.
    kinds = ["a"] * 500 + ["b"] * 500
    many = (random_scores(1000, seed=2) > 0.3).double().tolist()
    parts = [standard_error(many[:500]), standard_error(many[500:])]
    assert macro_error(many, kinds, range(1000)) == pytest.approx(math.hypot(*parts) / 2, rel=2e-3)
    assert math.isnan(macro_error([1.0, 0.0], ["a", "b"], [0, 0]))


def test_the_best_threshold_against_all():
    score, label = random_scores(60, seed=3).round(decimals=1), random_scores(60, seed=4) > 0.2
    threshold = best_threshold(score, label)
    values = [*score.unique().tolist(), -9.0]
    most = max(int(((score > value) == label).sum()) for value in values)
    assert int(((score.double() > threshold) == label).sum()) == most
    assert bool((score.double() > best_threshold(score, torch.ones(60, dtype=torch.bool))).all())
    assert not bool((score.double() > best_threshold(score, torch.zeros(60, dtype=torch.bool))).any())


def test_half_of_the_scores_are_above_their_median():
    for n in (10, 11):
        score = random_scores(n, seed=n)
        assert int((score.double() > median_threshold(score)).sum()) == n // 2


def test_auc_against_all_pairs():
    score, label = random_scores(40, seed=5).round(decimals=1), random_scores(40, seed=6) > 0
    true, false = score[label].tolist(), score[~label].tolist()
    wanted = sum((t > f) + 0.5 * (t == f) for t in true for f in false) / (len(true) * len(false))
    area, error = auc(score, label)
    assert area == pytest.approx(wanted) and 0 < error < 0.2
    assert math.isnan(auc(score, torch.ones(40, dtype=torch.bool))[0])


def test_the_error_of_auc_is_its_spread():
    label = torch.arange(80) % 2 == 0
    areas, errors = zip(*(auc(random_scores(80, seed=seed) + label, label) for seed in range(400)))
    assert float(torch.tensor(areas).std()) == pytest.approx(sum(errors) / 400, rel=0.1)
