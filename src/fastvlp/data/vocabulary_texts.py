"""The texts that a new tokenizer is trained on: those of all records, or of a sample of many."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from fastvlp.data.records.interface import SplitRecords
from fastvlp.data.records.schema import clean_text, usable_captions
from fastvlp.data.records.shards import RecordError
from fastvlp.errors import UserError
from fastvlp.random import sample_indices

# Other fields that fine-tuning reads later, and the key of the text in their entries. The tokenizer has to know their words.
_OTHER_TEXTS = (("questions", "question"), ("statements", "text"))
# The seed of the sample. Runs of several seeds share a vocabulary, and can be compared.
_SEED = 1


def vocabulary_texts(shards: SplitRecords, field: str, ahead: int = 0, most: int | None = None) -> Iterator[str]:
    """Yields the captions, and the questions and statements in the same languages. `ahead`, `most`: as for `readable_infos`.

    Raises UserError if no record has a caption.
    """
    languages = [name.removeprefix("captions") for name in field.split("+")]
    fields = [(f"{other}{language}", text) for language in languages for other, text in _OTHER_TEXTS]
    any_caption, names = False, set[str]()
    for info in readable_infos(shards, ahead, most):
        captions = usable_captions(info, field)
        any_caption |= bool(captions)
        if not any_caption:
            names |= info.keys()
        yield from captions
        for other, text in fields:
            entries = info.get(other)
            dicts = [entry for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []
            yield from filter(None, (clean_text(entry.get(text)) for entry in dicts))
    if not any_caption:
        raise UserError(
            f"{shards.url}: no record has {field!r}; name the field of the captions with `data.captions` "
            f"(fields: {', '.join(sorted(names)) or 'none'}), or import again and name their column with `caption_column`"
        )


def readable_infos(shards: SplitRecords, ahead: int = 0, most: int | None = None) -> Iterator[dict[str, Any]]:
    """Yields the info of every record whose info can be read. The errors of the others are reported when batches are made.

    Args:
        ahead: records that are read in one go, with their images; 0 reads each info by itself.
        most: of more records than this, so many, drawn evenly; those that are read in one go are drawn together.
    """
    size, count = max(1, ahead), len(shards)
    parts = -(-count // size)
    for part in sample_indices(parts, parts if most is None else -(-most // size), _SEED):
        records = range(part * size, min((part + 1) * size, count))
        if ahead:
            shards.hold(records)
        for i in records:
            with suppress(RecordError):
                yield shards.info(i)
            if ahead:
                shards.release([i])
