"""Classification metrics: ranks of the right classes, accuracies, and means over groups."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from fastvlp.eval.uncertainty import standard_error


def class_ranks(score_IC: Tensor, label_I: Tensor, *, tie: float = 0.0) -> Tensor:
    """The rank of each image's right class, from 1 -> [I].

    Every other class whose score is at least the right one's, less `tie`, ranks before it; so does every class where one
    of the two scores is NaN. A model that gives all classes the same score has no hits.
    """
    own_I1 = score_IC.gather(1, label_I[:, None])
    return score_IC.shape[1] - (score_IC < own_I1 - tie).sum(1)


def accuracy_by_class(rank_I: Tensor, label_I: Tensor, classes: int) -> Tensor:
    """The share of each class's images that have rank 1 -> [C]; NaN for a class without images."""
    hit_C = torch.zeros(classes, dtype=torch.float64, device=rank_I.device).index_add(
        0, label_I, (rank_I <= 1).double()
    )
    return hit_C / label_I.bincount(minlength=classes)


def class_scores(rank_I: Tensor, label_I: Tensor, classes: int) -> dict[str, float]:
    """`top1`; `top5` if there are more than five classes; `mean_per_class`, the mean top-1 of the classes that occur."""
    shares = {f"top{k}": float((rank_I <= k).double().mean()) for k in (1, 5) if k < max(classes, 2)}
    return shares | {"mean_per_class": float(accuracy_by_class(rank_I, label_I, classes).nanmean())}


def class_chance(classes: int) -> dict[str, float]:
    """Returns the average of `class_scores` if the classes are in random order."""
    return {f"top{k}": k / classes for k in (1, 5) if k < max(classes, 2)} | {"mean_per_class": 1 / classes}


def class_errors(rank_I: Tensor, label_I: Tensor, classes: int) -> dict[str, float]:
    """Standard errors of `class_scores`; that of the mean over classes only where each class has two images or none."""
    if len(rank_I) < 2:
        return {}
    tops = [k for k in (1, 5) if k < max(classes, 2)]
    errors = {f"top{k}": standard_error((rank_I <= k).double().tolist()) for k in tops}
    count_C = label_I.bincount(minlength=classes)
    share_C, count_C = accuracy_by_class(rank_I, label_I, classes)[count_C > 0], count_C[count_C > 0]
    if int(count_C.min()) > 1:
        errors["mean_per_class"] = float((share_C * (1 - share_C) / (count_C - 1)).sum().sqrt() / len(count_C))
    return errors


def mean_by(values: Sequence[float], groups: Sequence[Hashable]) -> dict[Hashable, float]:
    """The mean of the values of each group; the groups in their natural order."""
    members: dict[Hashable, list[float]] = {}
    for value, group in zip(values, groups, strict=True):
        members.setdefault(group, []).append(value)
    return {group: sum(members[group]) / len(members[group]) for group in sorted(members, key=str)}
