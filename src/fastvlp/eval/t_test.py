"""Student's t test of a mean, exact for whole degrees of freedom."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from fastvlp.errors import UserError


def p_above(values: Sequence[float], level: float) -> float:
    """The probability of a mean at least as far above `level` as that of these values, if the true mean were `level`: the p
    value of a one-sided t test.

    Raises UserError for fewer than two values, whose spread is not known.
    """
    if len(values) < 2:
        raise UserError(f"a t test needs at least two values, not {len(values)}")
    mean, deviation = statistics.fmean(values), statistics.stdev(values)
    if deviation == 0:
        return 0.0 if mean > level else 1.0
    t = (mean - level) / (deviation / math.sqrt(len(values)))
    within = central(abs(t), len(values) - 1)
    return (1 - within) / 2 if t > 0 else (1 + within) / 2


def central(t: float, freedom: int) -> float:
    """The probability that a variable of Student's distribution lies within ±t (Abramowitz and Stegun, 26.7.3 and 26.7.4)."""
    angle = math.atan(t / math.sqrt(freedom))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = freedom % 2
    # 1 + 1/2 c^2 + (1 3)/(2 4) c^4 + ..., or for odd degrees c + 2/3 c^3 + (2 4)/(3 5) c^5 + ...
    term, total = (cosine, cosine) if odd else (1.0, 1.0)
    for i in range(1 + odd, freedom - 2, 2):
        term *= i / (i + 1) * cosine**2
        total += term
    if not odd:
        return sine * total
    return 2 / math.pi * (angle + sine * total if freedom > 1 else angle)
