"""What can be wrong with the fields of a record that the library reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

LISTS_OF_TEXT = ("captions", "captions_zh")
LISTS_OF_OBJECTS = {
    "objects": ("class", "box"),
    "questions": ("question", "answers"),
    "questions_zh": ("question", "answers"),
    "statements": ("text", "label"),
    "statements_zh": ("text", "label"),
    "expressions": ("text", "object"),
    "expressions_zh": ("text", "object"),
    "entailments": ("text", "label"),
    "entailments_zh": ("text", "label"),
    "choices": ("question", "answers"),
    "choices_zh": ("question", "answers"),
}
# Heads have them in this order.
LABELS = ("contradiction", "entailment", "neutral")


def fault(info: Mapping[str, Any]) -> str | None:
    """The first thing that is wrong, with its field; None when nothing is."""
    for name in LISTS_OF_TEXT:
        if name in info and not isinstance(info[name], list):
            return f"field {name} is not a list of texts"
    if "confidences" in info and (wrong := confidences_fault(info["confidences"])):
        return wrong
    return next(filter(None, (list_fault(info, name) for name in LISTS_OF_OBJECTS)), None)


def list_fault(info: Mapping[str, Any], name: str) -> str | None:
    """The first thing that is wrong with the field `name`, a list of objects."""
    items, fields = info.get(name, []), LISTS_OF_OBJECTS[name]
    if not isinstance(items, list) or not all(isinstance(o, dict) and all(f in o for f in fields) for o in items):
        return f"field {name} is not a list of objects with {' and '.join(fields)}"
    check = _CHECKS[name.removesuffix("_zh")]
    wrong = next(filter(None, map(check, items)), None)
    if wrong is None and name.startswith("expressions"):
        wrong = _pointer_fault(items, info.get("objects", []))
    return None if wrong is None else f"field {name}: {wrong}"


def box_fault(box: Any) -> str | None:
    """A box is [x0, y0, x1, y1] in pixels; it may reach beyond the image."""
    if isinstance(box, list) and len(box) == 4 and all(map(_number, box)) and box[0] <= box[2] and box[1] <= box[3]:
        return None
    return f"box {_short(box)} is not four numbers [x0, y0, x1, y1] with x0 <= x1 and y0 <= y1"


def confidences_fault(lists: Any) -> str | None:
    """Of each image a detector's confidences, falling."""
    if isinstance(lists, list) and lists and all(isinstance(one, list) and all(map(_number, one)) for one in lists):
        falling = all(a >= b for one in lists for a, b in pairwise(one))
        return None if falling else "field confidences: an image's are not falling"
    return f"field confidences {_short(lists)} is not a list of numbers for each image"


def distribution_fault(shares: Any) -> str | None:
    """A class distribution is {class: share}."""
    if isinstance(shares, dict) and all(_number(share) and share >= 0 for share in shares.values()):
        return None
    return f"class_distribution {_short(shares)} is not {{class: share of 0 or more}}"


def answers_fault(answers: Any) -> str | None:
    """Answers are {answer: how right it is}."""
    if not isinstance(answers, dict):
        return f"answers {_short(answers)} are not {{answer: score}}"
    wrong = next((answer for answer, score in answers.items() if not (_number(score) and 0 <= score <= 1)), None)
    return None if wrong is None else f"score {_short(answers[wrong])} of answer {wrong!r} is not a number from 0 to 1"


def label_fault(label: Any) -> str | None:
    """A statement's label is true or false (or 1 or 0); the text "False" would count as true."""
    return None if label in (True, False) else f"label {_short(label)} is not true or false"


def entailment_fault(label: Any) -> str | None:
    return None if label in LABELS else f"label {_short(label)} is not one of {', '.join(LABELS)}"


def choice_fault(choice: Mapping[str, Any]) -> str | None:
    """Answers, and rationales where there are any, are lists of texts, and what is right is a place in them; a test split
    does not tell what is right."""
    for texts, right in (("answers", "right"), ("rationales", "right_rationale")):
        told, at = choice.get(texts, []), choice.get(right)
        if not isinstance(told, list) or not all(isinstance(text, str) for text in told):
            return f"{texts} {_short(told)} are not a list of texts"
        if at is not None and (not isinstance(at, int) or not 0 <= at < len(told)):
            return f"{right} {_short(at)} is no place among {len(told)} {texts}"
    return None


def _pointer_fault(expressions: list[Mapping[str, Any]], objects: Any) -> str | None:
    count = len(objects) if isinstance(objects, list) else 0
    wrong = [at for told in expressions if not isinstance(at := told["object"], int) or not 0 <= at < count]
    return f"object {_short(wrong[0])} is no place among {count} objects" if wrong else None


_CHECKS: dict[str, Callable[[Mapping[str, Any]], str | None]] = {
    "objects": lambda item: box_fault(item["box"]),
    "questions": lambda item: answers_fault(item["answers"]),
    "statements": lambda item: label_fault(item["label"]),
    "expressions": lambda item: None,
    "entailments": lambda item: entailment_fault(item["label"]),
    "choices": choice_fault,
}


def _number(x: Any) -> bool:
    return isinstance(x, int | float) and abs(x) < 1e9  # JSON also has NaN, and integers that no float holds


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + "…"
