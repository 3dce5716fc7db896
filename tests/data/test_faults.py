import json
import math

import pytest

from fastvlp.data.records.schema import distribution_fault, fault

GOOD = {
    "captions": ["a"],
    "objects": [{"class": "c", "box": [0, 0.5, 10, 20]}, {"class": "c", "box": [-0.5, 1, 3, 1]}],
    "questions": [{"question": "q", "answers": {"yes": 1.0, "no": 0}}, {"question": "q", "answers": {}}],
    "questions_zh": [{"question": "问", "answers": {"是": 0.3}}],
    "statements": [{"text": "t", "label": False}, {"text": "t", "label": 1}],
    "expressions": [{"text": "e", "object": 1}],
    "entailments_zh": [{"text": "e", "label": "neutral"}],
    "choices": [
        {"question": "q", "answers": ["a", "b"], "right": 1, "rationales": ["c"], "right_rationale": 0},
        {"question": "of a test split", "answers": ["a"]},
    ],
    "confidences": [[0.9, 0.9, 0.1], []],
    "other": {"box": None},
}


def test_correct_fields_have_no_fault() -> None:
    assert fault(GOOD) is None and fault({}) is None


@pytest.mark.parametrize(
    "box",
    [None, "10", [0, 0, 1], [0, 0, 1, math.nan], [0, 0, 1, math.inf], [0, 0, 1, 10**400], [2, 0, 1, 1], ["0"] * 4],
)
def test_a_box_is_four_numbers(box: object) -> None:
    wrong = fault({"objects": [*GOOD["objects"], {"class": "c", "box": box}]})
    assert wrong and wrong.startswith("field objects: box ") and "not four numbers" in wrong


@pytest.mark.parametrize("shares", [None, ["cat"], {"cat": -0.1}, {"cat": math.nan}, {"cat": "all"}])
def test_a_class_distribution_holds_shares(shares: object) -> None:
    assert distribution_fault({"cat": 0.8, "dog": 0}) is None
    assert "is not {class: share of 0 or more}" in (distribution_fault(shares) or "")


@pytest.mark.parametrize("score", ["often", None, math.nan, -0.1, 3, [1], "1.0"])
def test_a_score_is_a_number_from_0_to_1(score: object) -> None:
    for name in ("questions", "questions_zh"):
        wrong = fault({name: [{"question": "q", "answers": {"yes": 1.0, "no": score}}]})
        assert wrong == f"field {name}: score {score!r} of answer 'no' is not a number from 0 to 1"


@pytest.mark.parametrize("answers", [None, ["yes"], "yes" * 100])
def test_answers_are_scored(answers: object) -> None:
    wrong = fault({"questions": [{"question": "q", "answers": answers}]})
    assert wrong and "are not {answer: score}" in wrong and len(wrong) < 130


@pytest.mark.parametrize("label", ["False", None, 2, [], {}])
def test_a_label_is_true_or_false(label: object) -> None:
    wrong = fault({"statements_zh": [{"text": "t", "label": label}]})
    assert wrong == f"field statements_zh: label {label!r} is not true or false"
    assert fault(json.loads('{"statements": 3}')) == "field statements is not a list of objects with text and label"


@pytest.mark.parametrize(
    ("name", "entry", "reason"),
    [
        ("expressions", {"text": "e", "object": 2}, "object 2 is no place among 2 objects"),
        ("expressions_zh", {"text": "e", "object": "cat"}, "object 'cat' is no place among 2 objects"),
        ("entailments", {"text": "e", "label": True}, "label True is not one of contradiction, entailment, neutral"),
        ("choices", {"question": "q", "answers": {"a": 1}}, "answers {'a': 1} are not a list of texts"),
        ("choices", {"question": "q", "answers": ["a", 2]}, "answers ['a', 2] are not a list of texts"),
        ("choices_zh", {"question": "q", "answers": ["a"], "right": 1}, "right 1 is no place among 1 answers"),
        ("choices", {"question": "q", "answers": ["a"], "right_rationale": 0}, "is no place among 0 rationales"),
        ("choices", {"question": "q"}, "field choices is not a list of objects with question and answers"),
    ],
)
def test_pointers_and_labels_are_checked(name: str, entry: dict, reason: str) -> None:
    wrong = fault({"objects": GOOD["objects"], name: [entry]})
    assert wrong and wrong.startswith(f"field {name}") and reason in wrong


@pytest.mark.parametrize("confidences", [0.9, [], [0.9], [[0.9, "1"]], [[math.nan]], [[0.1, 0.2]]])
def test_confidences_fall(confidences: object) -> None:
    assert (fault({"confidences": confidences}) or "").startswith("field confidences")
