"""Retrieval before and after tuning, on held-out pairs of the new kind and of the kind that the model knew."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from fastvlp.data.records.shards import Shards
from fastvlp.eval.embedding import embed_split
from fastvlp.eval.encoding import MaskedEncoding, open_towers
from fastvlp.eval.ranks import retrieval
from fastvlp.eval.split_reading import read_captions


class Held(NamedTuple):
    """Held-out pairs: their folder, and the field of the captions."""

    place: str
    captions: str


def recall_on(model: str | Path, held: Held, encoding: MaskedEncoding) -> dict[str, float]:
    """Retrieval among all pairs of a split: the metrics of `recall`, and of the mean recall also the standard error (`error`)
    and what a random order has (`chance`); numbers of `images` and `texts`. Raises UserError if a record cannot be used: an
    evaluation leaves none out."""
    loaded = open_towers(model, encoding).loaded
    shards = Shards(held.place)
    embeddings = embed_split(loaded, shards, read_captions(shards, held.captions))
    scores, errors, chance = retrieval(*embeddings)
    counts = {"images": len(shards), "texts": len(embeddings.text_TE)}
    return scores | {"error": errors.get("recall", 0.0), "chance": chance["recall"]} | counts


def change_line(name: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """The mean recall of both models on one split in per cent, with standard errors, for people."""
    old, new = 100 * before["recall"], 100 * after["recall"]
    return (
        f"{name}: mean recall {old:.1f} ± {100 * before['error']:.1f} % before, {new:.1f} ± {100 * after['error']:.1f} % now "
        f"({new - old:+.1f}; chance {100 * after['chance']:.1f}), {after['images']:,} images, {after['texts']:,} texts"
    )
