"""Answers that the official VQA evaluation gave (tests/golden/metrics_vqa.json)."""

import json

import pytest

from fastvlp.data.answers import normalise_answer, soft_scores, strip_punctuation, vqa_accuracy
from fastvlp.eval.classification import mean_by
from tests.golden import FOLDER

KNOWN = json.loads((FOLDER / "metrics_vqa.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("case", KNOWN["normalisation"], ids=lambda case: case["input"])
def test_normalisation_is_the_official_one(case):
    assert strip_punctuation(case["input"]) == case["after_punctuation"]
    assert normalise_answer(case["input"]) == case["after_all"]


@pytest.mark.parametrize("case", KNOWN["questions"], ids=lambda case: case["prediction"].strip())
def test_accuracy_of_a_question(case):
    assert round(100 * vqa_accuracy(case["prediction"], case["answers"]), 2) == case["accuracy_percent"]


def test_accuracy_of_all_and_by_type():
    scores = [100 * vqa_accuracy(case["prediction"], case["answers"]) for case in KNOWN["questions"]]
    assert sum(scores) / len(scores) == pytest.approx(KNOWN["overall"], abs=1e-4)
    kinds = mean_by(scores, [case["answer_type"] for case in KNOWN["questions"]])
    assert kinds == pytest.approx(KNOWN["per_answer_type"], abs=1e-4)


def test_missing_apostrophes_are_put_back_only_where_no_other_word_is_meant():
    assert normalise_answer("dont") == "don't"
    assert normalise_answer("couldnt've") == normalise_answer("couldn'tve") == "couldn't've"
    assert normalise_answer("its well were") == "its well were"


def test_soft_scores_are_the_official_accuracies_of_the_given_answers():
    assert soft_scores(["red"] * 8 + ["dark red", "pink"]) == {
        "red": 1.0,
        "dark red": pytest.approx(0.3),
        "pink": pytest.approx(0.3),
    }
