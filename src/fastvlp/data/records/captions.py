"""Captions in the forms that people store them: a text, a list of texts or of objects, a list written as JSON in a cell."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from typing import Any

from fastvlp.plain_json import parse_json

# Where a caption is an object, its text is in the first of these that it has (Karpathy: `raw`, COCO: `caption`).
TEXT_KEYS = ("raw", "caption", "captions", "text", "sentence", "sentences", "value", "content", "en")
# Suffixes of a tar's members that hold captions.
CAPTION_SUFFIXES = ("txt", "text", "caption", "captions", "cap")


def caption_texts(value: Any) -> list[str]:
    """Returns all captions in a value, in order, without values that are empty or not text."""
    return [text for text in _texts(value) if text.strip()]


def has_other_values(value: Any) -> bool:
    """Whether a value holds something that is neither a text nor empty, such as a number, and that is no caption."""
    if isinstance(value, list | tuple):
        return any(map(has_other_values, value))
    if isinstance(value, Mapping):
        return bool(value) and not caption_texts(value) and not caption_texts(value.get("zh"))
    return value is not None and not isinstance(value, str)


def parse_list(text: str) -> Any:
    """The list that a cell holds as JSON or as Python writes it; the text itself where it is no list of texts."""
    stripped = text.strip()
    if not (stripped.startswith("[") and stripped.endswith("]")):
        return text
    for parse in (parse_json, ast.literal_eval):
        try:
            value = parse(stripped)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        if isinstance(value, list) and caption_texts(value):
            return value
    return text


def merge_captions(info: Mapping[str, Any], texts: list[str] | None = None) -> dict[str, Any]:
    """The info with all its captions as the list `captions`: `texts` from a file beside it, or else those of its own field
    `captions` or `caption`."""
    rest = {name: value for name, value in info.items() if name not in ("caption", "captions")}
    own = [value for name in ("captions", "caption") for value in caption_texts(info.get(name))]
    captions = texts or list(dict.fromkeys(own))
    if not captions and not {"caption", "captions"} & info.keys():
        return rest
    return {**rest, "captions": captions}


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _texts(part)
    elif isinstance(value, Mapping):
        yield from _texts(next((value[key] for key in TEXT_KEYS if value.get(key)), None))
