"""The scores that every task needs: pure functions of numbers."""

from __future__ import annotations

from collections.abc import Hashable, Sequence


def mean_by(values: Sequence[float], kinds: Sequence[Hashable]) -> dict[Hashable, float]:
    """The mean of the values of each kind, kinds in their natural order."""
    groups: dict[Hashable, list[float]] = {}
    for value, kind in zip(values, kinds, strict=True):
        groups.setdefault(kind, []).append(value)
    return {kind: sum(groups[kind]) / len(groups[kind]) for kind in sorted(groups, key=str)}
