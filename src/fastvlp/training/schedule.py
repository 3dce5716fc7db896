"""The learning rate as a function of progress, 0 at the start and 1 at the end, in steps or in time."""

from __future__ import annotations

import math
from typing import Literal

Decay = Literal["linear", "cosine", "constant"]


def rate_factor(progress: float, warmup: float, decay: Decay) -> float:
    """Linear warm-up over the share `warmup`, then decay to 0 (linear: METER, FLM; cosine: Loshchilov & Hutter 2017)."""
    if progress < warmup:
        return progress / warmup
    rest = min(1.0, (progress - warmup) / (1 - warmup)) if warmup < 1 else 1.0
    if decay == "linear":
        return 1 - rest
    if decay == "cosine":
        return 0.5 * (1 + math.cos(math.pi * rest))
    return 1.0
