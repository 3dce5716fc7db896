"""The scores that every task needs: pure functions of tensors."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from torch import Tensor


def accuracy(predicted_N: Tensor, target_N: Tensor) -> float:
    """Share of equal entries; nan where there are none."""
    return (predicted_N == target_N).double().mean().item()


def mean_by(values: Sequence[float], kinds: Sequence[Hashable]) -> dict[Hashable, float]:
    """The mean of the values of each kind, kinds in their natural order."""
    groups: dict[Hashable, list[float]] = {}
    for value, kind in zip(values, kinds, strict=True):
        groups.setdefault(kind, []).append(value)
    return {kind: sum(groups[kind]) / len(groups[kind]) for kind in sorted(groups, key=str)}
