"""Converts the cells of a row to the fields of a record: captions in one or several columns, questions, conversations,
classes."""

from __future__ import annotations

import datetime
import decimal
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from fastvlp.data.answers import normalise_answer, soft_scores
from fastvlp.data.records.captions import caption_texts, has_other_values, parse_list
from fastvlp.data.records.schema import is_absent
from fastvlp.data.sources.delimited import plain_name
from fastvlp.data.sources.interface import Note
from fastvlp.plain_json import parse_json

IMAGE_COLUMNS = (
    *("image", "file", "filepath", "file_name", "filename", "image_path", "path", "images", "img", "img_path"),
    *("image_file", "image_name", "imgpath", "imagepath", "image_filename", "img_name", "img_file", "picture", "photo"),
)
URL_COLUMNS = ("url", "image_url", "img_url", "urls")
CAPTION_COLUMNS = (
    *("caption", "captions", "text", "title", "sentence", "sentences", "raw", "comment", "description", "texts"),
    *("alt_text", "alt", "txt", "image_caption", "caption_text", "caption_reference_description"),
    *("caption_en", "captions_en", "text_en"),
)
CHINESE_COLUMNS = ("caption_zh", "captions_zh")
LABEL_COLUMNS = ("label", "class", "class_name", "category", "labels", "target")
USUAL_COLUMNS = frozenset({*IMAGE_COLUMNS, *URL_COLUMNS, *CAPTION_COLUMNS, *CHINESE_COLUMNS, *LABEL_COLUMNS, "split"})

# `caption_1`, `caption_2`: columns of one caption each.
_COUNTED = re.compile(r"(?:caption|text|sentence|comment|description)s?_?\d+")
# An instruction to describe the picture, whose answer is a caption (LLaVA's pretraining).
_DESCRIBE = re.compile(
    r"\b(?:descri(?:be|ption|bing)|caption|summari[sz]e|summary|narrate|portray|depict|write a terse|what is this\?|"
    r"what is in (?:the|this) (?:photo|image|picture)|what do you see|what do you think is going on|explain the visual|"
    r"render a clear|give a short|give a brief|share a concise|present a compact|relay a brief|provide a brief|clarify)\b",
    re.IGNORECASE,
)
_PLACEHOLDER = re.compile(r"\s*<(?:image|img|ImageHere)>\s*", re.IGNORECASE)


def find_columns(row: Mapping[str, Any], usual: Sequence[str]) -> list[str]:
    """The columns of a row with usual names, in the order of `usual`."""
    by_name = {plain_name(str(name)): name for name in reversed([*row])}
    return [by_name[name] for name in usual if name in by_name]


def caption_columns(row: Mapping[str, Any], given: str) -> list[str]:
    """The columns of captions: those given, joined by +; or else the first with a usual name, and all that are counted."""
    if given:
        return [name for name in ([given] if given in row else given.split("+")) if name in row]
    usual = find_columns(row, CAPTION_COLUMNS)
    counted = [name for name in row if _COUNTED.fullmatch(plain_name(str(name))) and name not in usual[:1]]
    return [*usual[:1], *counted]


def short(value: Any, most: int = 40) -> str:
    """A value as a message shows it: one line, cut."""
    text = " ".join(str(value).split())
    return text if len(text) <= most else text[:most] + "…"


def take_captions(row: dict[str, Any], columns: Sequence[str], place: str) -> tuple[list[str], list[Note]]:
    """Removes the columns of captions from a row, and returns their texts and what is left out of them."""
    texts: list[str] = []
    notes = []
    for column in columns:
        cell = row.pop(column, None)
        value = parse_list(cell) if isinstance(cell, str) else cell
        own_texts = caption_texts(value)
        texts += own_texts
        if has_other_values(value):
            notes.append(Note(text=f"values of {short(column)} that are no text are left out", example=place))
        elif not own_texts:
            notes.append(Note(text=f"rows whose {short(column)} is empty", example=place))
    return texts, notes


def task_fields(row: dict[str, Any]) -> dict[str, Any]:
    """Removes questions, answers and conversations from a row, and returns them as fields of a record."""
    turns = row.pop("conversations", None) or row.pop("messages", None)
    if turns is not None and (fields := conversation(turns)) is not None:
        return fields
    question = row.get("question")
    if not isinstance(question, str) or "questions" in row:
        return {}
    del row["question"]
    answers = [row.pop(name) for name in ("answers", "answer", "multiple_choice_answer") if name in row]
    return {"questions": [{"question": question, "answers": _scored(answers[0] if answers else None)}]}


def conversation(turns: Any) -> dict[str, Any] | None:
    """Questions, and captions where the picture was to be described, of a conversation: {from, value} or {role, content} in
    turn. None if it is none."""
    if isinstance(turns, str):
        try:
            turns = parse_json(turns)
        except ValueError:
            return None
    if not isinstance(turns, list) or not all(isinstance(turn, Mapping) for turn in turns):
        return None
    captions: list[str] = []
    questions: list[dict[str, Any]] = []
    question = ""
    for turn in turns:
        words = " ".join(caption_texts(turn.get("value", turn.get("content"))))
        text = _PLACEHOLDER.sub(" ", words).strip()
        if turn.get("from", turn.get("role")) in ("human", "user"):
            question = text
        elif turn.get("from", turn.get("role")) in ("gpt", "assistant", "model", "bot"):
            if not question or _DESCRIBE.search(question):
                captions.append(text)
            else:
                questions.append({"question": question, "answers": {text: 1.0}})
            question = ""
    fields = {"captions": captions, "questions": questions}
    return {name: values for name, values in fields.items() if values}


def take_label(row: dict[str, Any], names: Mapping[str, Sequence[str]]) -> Any:
    """Removes the class from a row and returns it, by its name where the table's schema names its classes."""
    for column in find_columns(row, LABEL_COLUMNS):
        if not is_absent(row[column]) and not isinstance(row[column], dict):
            value, classes = row.pop(column), names.get(column, ())
            known = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(classes)
            return classes[value] if known else value
    return None


def storable(value: Any) -> Any:
    """A cell as JSON can hold it; None if it cannot. Bytes are no field of a record."""
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, decimal.Decimal):
        return float(value)
    try:
        json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        return None
    return value


def _scored(answers: Any) -> dict[str, float]:
    """Scores of answers: {answer: score} as it is, several by VQA's rule where people gave them, one or few as right."""
    if isinstance(answers, Mapping):
        return dict(answers)
    value = parse_list(answers) if isinstance(answers, str) else answers
    if isinstance(value, list) and value and all(isinstance(one, Mapping) and "answer" in one for one in value):
        value = [one["answer"] for one in value]
    texts = [str(one) for one in (value if isinstance(value, list) else [value]) if not is_absent(one)]
    if len(texts) >= 10:
        return soft_scores([normalise_answer(text) for text in texts])
    return dict.fromkeys(texts, 1.0)
