"""Retrieval before and after tuning, on held-out pairs of the new kind and of the kind that the model knew."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from fastvlp.data.records.shards import Shards
from fastvlp.eval.embedding import embed_split
from fastvlp.eval.encoding import MaskedEncoding, open_towers
from fastvlp.eval.ranks import retrieval_scores
from fastvlp.eval.split_reading import read_captions


class Held(NamedTuple):
    """Held-out pairs: their folder, and the field of the captions."""

    place: str
    captions: str


def recall_on(model: str | Path, held: Held, encoding: MaskedEncoding) -> dict[str, float]:
    """Retrieval among all pairs of a split: the metrics of `recall`, `chance`, `images` and `texts`. Raises UserError where a
    record cannot be used: an evaluation leaves none out."""
    loaded = open_towers(model, encoding).loaded
    shards = Shards(held.place)
    embeddings = embed_split(loaded, shards, read_captions(shards, held.captions))
    counts = {"images": float(len(shards)), "texts": float(len(embeddings.text_TE))}
    return retrieval_scores(*embeddings) | {"chance": chance(embeddings.image_of_text_T)} | counts


def chance(image_of_text_T: Tensor) -> float:
    """Expected mean recall (R@1, 5, 10 in both directions) of a random order, where an image is found by any of its texts."""
    texts, own_texts = len(image_of_text_T), Counter(image_of_text_T.bincount().tolist())
    images, shares = own_texts.total(), []
    for k in (1, 5, 10):
        # That none of an image's own texts is among the first k is hypergeometric.
        missed = {own: math.comb(texts - own, k) / math.comb(texts, k) if texts >= k else 0.0 for own in own_texts}
        shares += [1 - sum(missed[own] * count for own, count in own_texts.items()) / images, min(k, images) / images]
    return sum(shares) / len(shares)


def change_line(name: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """The mean recall of both models on one split, for people."""
    old, new = 100 * before["recall"], 100 * after["recall"]
    return (
        f"{name}: mean recall {old:.1f} % before, {new:.1f} % now ({new - old:+.1f}; chance {100 * after['chance']:.1f}), "
        f"{after['images']:,.0f} images, {after['texts']:,.0f} texts"
    )
