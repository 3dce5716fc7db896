"""Standard errors and chance levels against simulation and known formulas."""

from __future__ import annotations

import math
from random import Random

import pytest
import torch

from fastvlp.eval.classification import class_chance, class_errors, class_ranks, class_scores
from fastvlp.eval.ranks import ranks, recall, recall_chance, recall_errors
from fastvlp.eval.uncertainty import standard_error, with_error


def test_the_error_of_a_mean_is_the_deviation_over_the_root_of_the_number():
    values = [0.0, 1.0, 1.0, 0.5, 0.25]
    known = torch.tensor(values, dtype=torch.float64).std() / math.sqrt(5)
    assert standard_error(values) == pytest.approx(float(known))
    assert standard_error([1.0, 1.0]) == 0 and math.isnan(standard_error([1.0]))
    assert with_error([1.0]) == {"accuracy": 1.0}
    assert with_error(values) == {"accuracy": 0.55, "standard_error": pytest.approx(float(known))}


def test_values_of_one_group_count_as_one():
    """Each value twice is no more evidence."""
    values = [0.0, 1.0, 1.0, 0.5, 0.25]
    twice = [value for value in values for _ in range(2)]
    assert standard_error(twice, [i // 2 for i in range(10)]) == pytest.approx(standard_error(values))
    assert standard_error(twice) < 0.75 * standard_error(values)
    assert math.isnan(standard_error(twice, ["one"] * 10))


COUNTS = [1, 3, 2, 5, 1, 2, 2]


def test_chance_of_recall_is_the_mean_over_random_orders():
    generator = torch.Generator().manual_seed(0)
    image_of_text = torch.arange(len(COUNTS)).repeat_interleave(torch.tensor(COUNTS))
    totals: dict[str, float] = {}
    for _ in range(1500):
        score = torch.rand(len(COUNTS), sum(COUNTS), generator=generator)
        for name, value in recall(*ranks(lambda i, t, s=score: s[i, t], image_of_text, len(COUNTS))).items():
            totals[name] = totals.get(name, 0.0) + value / 1500
    chance = recall_chance(COUNTS)
    assert chance.keys() == {name for name in totals if "median" not in name}
    for name, value in chance.items():
        assert value == pytest.approx(totals[name], rel=0.05), name
    assert recall_chance([1] * 1000)["text_to_image/r1"] == pytest.approx(0.001)
    assert recall_chance([1, 1])["recall"] == pytest.approx((0.5 + 1 + 1) / 3)


def test_errors_of_recall_are_those_of_drawing_other_images():
    """A query's rank is drawn for each image, and its captions share it: the spread over many draws."""
    rng, images = Random(0), 40
    image_of_text = torch.arange(images).repeat_interleave(3)
    found: dict[str, list[float]] = {}
    errors: dict[str, list[float]] = {}
    for _ in range(400):
        rank = torch.tensor([rng.choice((1, 3, 8, 20)) for _ in range(images)])
        ranked = rank, rank.repeat_interleave(3)
        for name, value in recall(*ranked).items():
            found.setdefault(name, []).append(value)
        for name, value in recall_errors(*ranked, image_of_text).items():
            errors.setdefault(name, []).append(value)
    assert errors.keys() == {name for name in found if "median" not in name}
    for name, its in errors.items():
        spread = float(torch.tensor(found[name]).std())
        assert sum(its) / len(its) == pytest.approx(spread, rel=0.1), name
    assert recall_errors(torch.ones(1), torch.ones(2), torch.zeros(2, dtype=torch.int64)) == {}


@pytest.mark.parametrize("classes", [4, 12])
def test_chance_and_errors_of_classification(classes):
    generator = torch.Generator().manual_seed(1)
    label = torch.arange(classes * 6) % classes
    found: dict[str, list[float]] = {}
    errors: dict[str, list[float]] = {}
    for _ in range(300):
        rank = class_ranks(torch.rand(len(label), classes, generator=generator), label)
        for name, value in class_scores(rank, label, classes).items():
            found.setdefault(name, []).append(value)
        for name, value in class_errors(rank, label, classes).items():
            errors.setdefault(name, []).append(value)
    chance = class_chance(classes)
    assert chance.keys() == found.keys() == errors.keys()
    for name, values in found.items():
        mean, spread = torch.tensor(values).mean(), torch.tensor(values).std()
        assert chance[name] == pytest.approx(float(mean), rel=0.06)
        assert sum(errors[name]) / len(errors[name]) == pytest.approx(float(spread), rel=0.12)


def test_a_class_with_one_image_has_no_error_of_its_own():
    label = torch.tensor([0, 0, 1])
    assert class_errors(torch.tensor([1, 2, 1]), label, 2).keys() == {"top1"}
