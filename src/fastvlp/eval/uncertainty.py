"""The uncertainty of a score: the standard error of a mean over records that were drawn at random."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence


def standard_error(values: Sequence[float], groups: Sequence[Hashable] | None = None) -> float:
    """The standard error of the mean of the values; NaN for a single group.

    Args:
        groups: what each value is about, such as the image of a question: values of one group depend on each other, so that
            only groups count as independent. By default each value is a group.
    """
    mean = sum(values) / len(values)
    sums: dict[Hashable, float] = {}
    for value, group in zip(values, range(len(values)) if groups is None else groups, strict=True):
        sums[group] = sums.get(group, 0.0) + value - mean
    n = len(sums)
    if n < 2:
        return math.nan
    return math.sqrt(n / (n - 1) * sum(total**2 for total in sums.values())) / len(values)


def error_at_the_end(n: int) -> float:
    """A standard error for a share of n items that is 0 or 1, where the items themselves show none."""
    # The add-one rule: as if one more item were right and one more wrong, so that k of n become k + 1 of n + 2.
    share = 1 / (n + 2)
    return math.sqrt(share * (1 - share) / (n + 2))


def with_error(values: Sequence[float], groups: Sequence[Hashable] | None = None) -> dict[str, float]:
    """`accuracy`, the mean of the values, and its `standard_error` where there is one."""
    error = standard_error(values, groups)
    return {"accuracy": sum(values) / len(values)} | ({} if math.isnan(error) else {"standard_error": error})


def numbers_only(values: Mapping[str, float]) -> dict[str, float]:
    """Those that are not NaN, as errors of too few records are."""
    return {name: value for name, value in values.items() if not math.isnan(value)}
