"""Texts as they come, to texts that every tokenizer takes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

# Control characters, the byte-order mark, and lone surrogates, which no tokenizer takes.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\ufeff\ud800-\udfff]+")


def clean_caption(text: Any) -> str | None:
    """The text without control characters and needless spaces; None where it is no text or nothing is left."""
    if not isinstance(text, str):
        return None
    return " ".join(_CONTROL.sub(" ", text).split()) or None


def usable_captions(info: Mapping[str, Any], field: str) -> list[str]:
    """The captions of a record's `field`, a list of texts or one text, cleaned; what is no text is left out. Of several
    fields, joined by + (`captions+captions_zh`), one after the other."""
    told = [text for name in field.split("+") for text in _listed(info.get(name))]
    return [text for text in map(clean_caption, told) if text is not None]


def _listed(told: Any) -> list[Any]:
    return told if isinstance(told, list) else [told]
