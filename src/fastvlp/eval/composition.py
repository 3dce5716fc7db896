"""Metrics of benchmarks that ask whether a model sees how the parts of a caption combine. Pure functions of scores of pairs.

Scores that differ by no more than `tie` are equal, and equal scores, like NaN, are no answer: where two pairs are compared, a
model that gives both the same score is not right.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor


def is_above(score_I: Tensor, other_I: Tensor, *, tie: float = 0.0) -> Tensor:
    """Compares two scores: True where the first is above the second by more than `tie`, bool in the shape of both."""
    return score_I - other_I > tie


def winoground_hits(score_I22: Tensor, *, tie: float = 0.0) -> dict[str, Tensor]:
    """Winoground's three scores of each item (arXiv 2204.03162, section 4) -> `text`, `image` and `group`, bool [I] each.

    Args:
        score_I22: [i, k, c] is the score of image k with caption c of item i, which belong together where k = c.
        tie: difference up to which scores are equal.
    """
    right_I2 = score_I22.diagonal(dim1=1, dim2=2)
    other_caption_I2 = torch.stack([score_I22[:, 0, 1], score_I22[:, 1, 0]], 1)
    other_image_I2 = other_caption_I2.flip(1)
    text_I = is_above(right_I2, other_caption_I2, tie=tie).all(1)
    image_I = is_above(right_I2, other_image_I2, tie=tie).all(1)
    return {"text": text_I, "image": image_I, "group": text_I & image_I}


# Of scores in random order. Each of two comparisons is right in one of two cases; in four of the 24 orders of four scores both
# right pairs are above both wrong ones.
WINOGROUND_CHANCE = {"text": 1 / 4, "image": 1 / 4, "group": 1 / 6}


def median_threshold(score_P: Tensor) -> float:
    """The median: half of the pairs are called true, whatever the scale of the scores. It reads no label."""
    return float(score_P.double().quantile(0.5))


def best_threshold(score_P: Tensor, label_P: Tensor) -> float:
    """The threshold above which pairs are called true that is right for the most pairs; the lowest of several.

    It lies midway between two scores that occur, or below or above all.
    """
    value_V = score_P.double().unique()
    middle = (value_V[1:] + value_V[:-1]) / 2
    threshold_C = torch.cat([value_V[:1] - 1, middle, value_V[-1:] + 1])
    # Pairs in the order of their scores: true ones below each threshold are wrong, false ones below it are right.
    order = score_P.double().argsort()
    sorted_P, truth_P = score_P.double()[order], label_P[order].long()
    below_C = torch.searchsorted(sorted_P, threshold_C, right=True)
    gain = torch.cat([truth_P.new_zeros(1), (1 - 2 * truth_P).cumsum(0)])
    return float(threshold_C[gain[below_C].argmax()])


def auc(score_P: Tensor, label_P: Tensor) -> tuple[float, float]:
    """Returns the share of true and false pairs in which the true one scores higher, where ties count half, and its standard
    error (DeLong et al. 1988).

    NaN where there are no true or no false pairs; the error also where there is only one of them.
    """
    true_T, false_F = score_P[label_P].double(), score_P[~label_P].double()
    above_TF = (true_T[:, None] > false_F).double() + 0.5 * (true_T[:, None] == false_F).double()
    if not above_TF.numel():
        return math.nan, math.nan
    own_T, own_F = above_TF.mean(1), above_TF.mean(0)
    variance = own_T.var() / len(own_T) + own_F.var() / len(own_F)
    return float(above_TF.mean()), float(variance.sqrt())


def macro_error(values: Sequence[float], kinds: Sequence[Hashable], groups: Sequence[Hashable]) -> float:
    """The standard error of the mean over kinds of the mean of each kind's values; NaN for a single group.

    Args:
        values: what was measured of each item.
        kinds: the kind of each item.
        groups: what each item is about, such as its image: only groups count as independent, across kinds too.
    """
    sums: dict[Hashable, float] = {}
    counts: dict[Hashable, int] = {}
    for value, kind in zip(values, kinds, strict=True):
        sums[kind] = sums.get(kind, 0.0) + value
        counts[kind] = counts.get(kind, 0) + 1
    parts: dict[Hashable, float] = {}
    for value, kind, group in zip(values, kinds, groups, strict=True):
        part = (value - sums[kind] / counts[kind]) / (counts[kind] * len(counts))
        parts[group] = parts.get(group, 0.0) + part
    n = len(parts)
    return math.sqrt(n / (n - 1) * sum(part**2 for part in parts.values())) if n > 1 else math.nan
