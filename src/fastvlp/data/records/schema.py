"""Checks the fields of a record that the library reads, and cleans their texts."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

LISTS_OF_TEXT = ("captions", "captions_zh")
# Lists of objects, and the fields that each object must have.
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
# The order of the outputs of an entailment head.
LABELS = ("contradiction", "entailment", "neutral")

# Control characters, the byte-order mark, and lone surrogates, which tokenizers do not accept.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\ufeff\ud800-\udfff]+")


def clean_text(text: Any) -> str | None:
    """Returns the text without control characters and repeated spaces; None if it is not a text or nothing is left."""
    if not isinstance(text, str):
        return None
    return " ".join(_CONTROL.sub(" ", text).split()) or None


def usable_captions(info: Mapping[str, Any], field: str) -> list[str]:
    """Returns the cleaned captions in a record's `field`, which is a list of texts or one text. Other values are left out.
    `field` may join several fields by + (`captions+captions_zh`); the captions of all of them are returned."""
    values = [info.get(name) for name in field.split("+")]
    texts = [text for value in values for text in (value if isinstance(value, list) else [value])]
    return [text for text in map(clean_text, texts) if text is not None]


def fault(info: Mapping[str, Any]) -> str | None:
    """Returns the first fault in a record's fields, with the name of the field; None if there is no fault."""
    for name in LISTS_OF_TEXT:
        if name in info and not isinstance(info[name], list):
            return f"field {name} is not a list of texts"
    if "confidences" in info and (wrong := confidences_fault(info["confidences"])):
        return wrong
    return next(filter(None, (list_fault(info, name) for name in LISTS_OF_OBJECTS)), None)


def is_absent(value: Any) -> bool:
    """Whether a value is empty. 0, 0.0 and false are not empty: the first class of many data sets is 0."""
    missing = isinstance(value, float) and value != value  # as pandas writes what is missing
    return missing or value is None or value == "" or value == [] or value == {}


def unstorable(info: Mapping[str, Any]) -> str | None:
    """Returns the first field that cannot be stored as JSON, with the reason; None if all fields can be stored."""
    for name, value in info.items():
        try:
            json.dumps({name: value}, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            return f"field {_short(name)} holds half of a character (a lone surrogate), which is no text"
        except (TypeError, ValueError, RecursionError) as error:
            return f"field {_short(name)} cannot be stored as JSON ({error})"
    return None


def list_fault(info: Mapping[str, Any], name: str) -> str | None:
    """Returns the first fault of the field `name`, a list of objects."""
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
    if isinstance(box, list) and len(box) == 4 and all(map(_is_number, box)) and box[0] <= box[2] and box[1] <= box[3]:
        return None
    return f"box {_short(box)} is not four numbers [x0, y0, x1, y1] with x0 <= x1 and y0 <= y1"


def confidences_fault(lists: Any) -> str | None:
    """`confidences` holds a list for each image: a detector's confidence in each region, falling."""
    if isinstance(lists, list) and lists and all(isinstance(one, list) and all(map(_is_number, one)) for one in lists):
        falling = all(a >= b for one in lists for a, b in pairwise(one))
        return None if falling else "field confidences: an image's are not falling"
    return f"field confidences {_short(lists)} is not a list of numbers for each image"


def distribution_fault(shares: Any) -> str | None:
    """A class distribution is {class: share}."""
    if isinstance(shares, dict) and all(_is_number(share) and share >= 0 for share in shares.values()):
        return None
    return f"class_distribution {_short(shares)} is not {{class: share of 0 or more}}"


def answers_fault(answers: Any) -> str | None:
    """Answers are {answer: score}, scores from 0 (wrong) to 1 (right)."""
    if not isinstance(answers, dict):
        return f"answers {_short(answers)} are not {{answer: score}}"
    wrong = next((answer for answer, score in answers.items() if not (_is_number(score) and 0 <= score <= 1)), None)
    return None if wrong is None else f"score {_short(answers[wrong])} of answer {wrong!r} is not a number from 0 to 1"


def label_fault(label: Any) -> str | None:
    """A statement's label is true or false (or 1 or 0); the text "False" would count as true."""
    return None if label in (True, False) else f"label {_short(label)} is not true or false"


def entailment_fault(label: Any) -> str | None:
    """An entailment's label is one of LABELS."""
    return None if label in LABELS else f"label {_short(label)} is not one of {', '.join(LABELS)}"


def choice_fault(choice: Mapping[str, Any]) -> str | None:
    """Answers, and rationales where there are any, are lists of texts; `right` and `right_rationale` are places in them, and
    are missing in a test split."""
    for texts, right in (("answers", "right"), ("rationales", "right_rationale")):
        options, place = choice.get(texts, []), choice.get(right)
        if not isinstance(options, list) or not all(isinstance(text, str) for text in options):
            return f"{texts} {_short(options)} are not a list of texts"
        if place is not None and (not isinstance(place, int) or not 0 <= place < len(options)):
            return f"{right} {_short(place)} is no place among {len(options)} {texts}"
    return None


def _pointer_fault(expressions: list[Mapping[str, Any]], objects: Any) -> str | None:
    """An expression's `object` is a place in the record's objects."""
    count = len(objects) if isinstance(objects, list) else 0
    places = (expression["object"] for expression in expressions)
    wrong = [place for place in places if not isinstance(place, int) or not 0 <= place < count]
    return f"object {_short(wrong[0])} is no place among {count} objects" if wrong else None


_CHECKS: dict[str, Callable[[Mapping[str, Any]], str | None]] = {
    "objects": lambda item: box_fault(item["box"]),
    "questions": lambda item: answers_fault(item["answers"]),
    "statements": lambda item: label_fault(item["label"]),
    "expressions": lambda item: None,
    "entailments": lambda item: entailment_fault(item["label"]),
    "choices": choice_fault,
}


def _is_number(x: Any) -> bool:
    return isinstance(x, int | float) and abs(x) < 1e9  # JSON also has NaN, and integers that no float holds


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + "…"
