"""Cloze accuracy: the share of the words of captions that a model predicts right, by the method it was trained for."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from fastvlp.batch import Batch
from fastvlp.model.freezing import evaluating
from fastvlp.model.model import VLModel
from fastvlp.objectives.objective import ClozeMethod


class Cloze(NamedTuple):
    """Accuracy in 0..1, NaN without words; the number of words that were predicted; the standard error, for which captions
    count as independent, not words: NaN for a single caption; and the number of captions."""

    accuracy: float
    words: int
    error: float = math.nan
    texts: int = 0


def word_positions(length_B: Tensor, L: int) -> Tensor:
    """The positions that are predicted, the same for every method: 1..n-2, without <s> and </s> -> bool [B L]."""
    position = torch.arange(L, device=length_B.device)
    return (position >= 1) & (position < length_B[:, None] - 1)


def cloze(model: VLModel, method: ClozeMethod, batches: Iterable[Batch]) -> Cloze:
    """Predicts the words of all texts by an objective's `cloze_method`.

    Batches are moved to the model's device. The number type is the caller's choice, by autocast.
    """
    right: list[int] = []
    count: list[int] = []
    device = next(model.parameters()).device
    with evaluating(model):
        for batch in (b.to(device) for b in batches):
            word_BL = word_positions(batch.length, batch.ids.shape[1])
            if not bool(word_BL.any()):
                continue
            image_BKD = model.encode_image(batch.image)
            predicted = method(model, image_BKD, batch)
            right += ((predicted == batch.ids) & word_BL).sum(1).tolist()
            count += word_BL.sum(1).tolist()
    words = sum(count)
    if not words:
        return Cloze(math.nan, 0)
    accuracy, n = sum(right) / words, len(count)
    # What each caption adds to the difference of a ratio of sums from its expectation.
    parts = [own - accuracy * of for own, of in zip(right, count)]
    error = math.sqrt(n / (n - 1) * sum(part**2 for part in parts)) / words if n > 1 else math.nan
    return Cloze(accuracy, words, error, n)
