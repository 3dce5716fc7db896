"""How two encoders are tuned on new pairs: what the user may choose, and what the number of pairs decides otherwise.

docs/why.md has the published runs from which the defaults come, and docs/log.md what was measured here.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, fields
from typing import NamedTuple

from fastvlp.config import Count, NotNegative, Positive, PositiveShare, Share, ShareBelowOne, check_numbers
from fastvlp.errors import UserError

# The width for which `Usual.lr` is meant, that of ViT-B. Under Adam a weight matrix keeps its pace if the rate falls as its
# width grows (Yang et al., arXiv 2203.03466, table 8).
WIDTH = 768
# No run needs a longer warm-up (WiSE-FT, arXiv 2109.01903; FLYP, 2212.00638).
LONGEST_WARMUP = 500
# Validations in a whole run.
VALIDATIONS = 20


class Usual(NamedTuple):
    """What is usual for a number of pairs.

    Attributes:
        rows: pairs that a step contrasts.
        epochs: how often each pair is read.
        lr: learning rate at width 768.
        layer_decay: share of the next layer's rate at which each layer learns.
        locked: share of each encoder's layers, from the first on, that stay as they are.
        reason: why, for people.
    """

    rows: int
    epochs: float
    lr: float
    layer_decay: float
    locked: float
    reason: str


# The least number of pairs for which each line is meant.
USUAL = {
    0: Usual(128, 20, 5e-5, 0.7, 0.5, "few pairs: late layers alone, and a high rate for a run of few steps"),
    10_000: Usual(256, 10, 3e-5, 0.75, 0.0, "enough pairs for all layers, the first ones slowly"),
    100_000: Usual(512, 5, 3e-5, 0.85, 0.0, "many pairs need few epochs"),
    1_000_000: Usual(1024, 3, 3e-5, 0.9, 0.0, "so many pairs are a short pretraining"),
}


@dataclass(frozen=True, kw_only=True)
class ContrastSettings:
    """How long and how fast the encoders learn. What is not given, the number of pairs decides."""

    epochs: Positive | None = None
    """How often each pair is read, unless validation ends the run before."""
    steps: Count | None = None
    """Steps after which the run ends, in place of `epochs`, unless validation ends it before."""
    batch_size: Count | None = None
    """Pairs of a micro-batch on each rank. A step contrasts all pairs of its micro-batches and ranks with each other."""
    accumulate: Count = 1
    """Micro-batches of a step: as many pairs are contrasted in less memory, each encoded twice."""
    lr: Positive | None = None
    """Learning rate of the last layers, at its highest."""
    warmup: ShareBelowOne | None = None
    """Share of the run in which the rate rises."""
    layer_decay: PositiveShare | None = None
    """Share of the next layer's rate at which each layer learns; 1: all alike."""
    locked: Share | None = None
    """Share of each encoder's layers, from the first on, that stay as they are, 0 to 1."""
    weight_decay: NotNegative = 0.1
    """Share of a weight, times the learning rate, that each step takes off."""
    patience: Count | None = 5
    """End the run after so many validations in a row without a new lowest loss; None: never."""
    alpha: Share = 1.0
    """How far the weights move from the old to the tuned ones: 0.5 is the mean of both, which keeps more of what the model
    could do before (WiSE-FT, arXiv 2109.01903); 1: all the way."""

    def __post_init__(self) -> None:
        check_numbers(self)
        if self.epochs is not None and self.steps is not None:
            raise UserError("both `steps` and `epochs` are given; give one of the two")


class Plan(NamedTuple):
    """How a known number of pairs is learned.

    Attributes:
        rows: pairs that a step contrasts, of all micro-batches and ranks; `batch_size` of them in each.
        reason: why the values that were not given are so, for people.
    """

    rows: int
    batch_size: int
    steps: int
    lr: float
    warmup: float
    layer_decay: float
    locked: float
    validate_every: int
    reason: str


def usual(pairs: int) -> Usual:
    """What is usual for a number of pairs."""
    least = sorted(USUAL)
    return USUAL[least[bisect_right(least, pairs) - 1]]


def plan(settings: ContrastSettings, pairs: int, width: int, ranks: int = 1) -> Plan:
    """The settings that are given, and what the number of pairs decides of the others.

    Args:
        pairs: of the training split.
        width: of the widest encoder that learns.
        ranks: processes that train together.

    Raises UserError where there are too few pairs to contrast any.
    """
    if pairs < 2:
        raise UserError(f"{pairs} pairs to tune on: a pair is contrasted with others; import more")
    own = usual(pairs)
    micro_batches = settings.accumulate * ranks
    # At most a quarter of all pairs: larger steps are few, and contrast the same pairs each time.
    wanted = min(own.rows, 1 << max(1, (pairs // 4).bit_length() - 1))
    batch = settings.batch_size or max(1, wanted // micro_batches)
    rows = batch * micro_batches
    steps = settings.steps or max(1, round((settings.epochs or own.epochs) * pairs / rows))
    return Plan(
        rows=rows,
        batch_size=batch,
        steps=steps,
        lr=settings.lr or own.lr * WIDTH / width,
        warmup=min(0.1, LONGEST_WARMUP / steps) if settings.warmup is None else settings.warmup,
        layer_decay=settings.layer_decay or own.layer_decay,
        locked=own.locked if settings.locked is None else settings.locked,
        validate_every=-(-steps // VALIDATIONS),
        reason=own.reason,
    )


def setting_names() -> list[str]:
    """Names of all settings."""
    return [field.name for field in fields(ContrastSettings)]
