"""Settings for fine-tuning two encoders on new pairs: the options of the user, and defaults that depend on the number of pairs.

docs/why.md names the published runs that the defaults come from, and docs/log.md has our measurements.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, fields
from typing import NamedTuple

from fastvlp.config import Count, NotNegative, Positive, PositiveShare, Share, ShareBelowOne, check_numbers
from fastvlp.errors import UserError

# The width for which `Usual.lr` is meant, that of ViT-B. With Adam, the learning rate of a matrix has to fall in proportion to
# its width (Yang et al., arXiv 2203.03466, table 8).
WIDTH = 768
# The longest warm-up, in steps, of published runs (WiSE-FT, arXiv 2109.01903; FLYP, 2212.00638).
LONGEST_WARMUP = 500
# Number of validations in a whole run.
VALIDATIONS = 20


class Usual(NamedTuple):
    """The default settings for a number of pairs.

    Attributes:
        rows: number of pairs that a step contrasts.
        epochs: number of times that each pair is read.
        lr: learning rate at width 768.
        layer_decay: factor of the learning rate between a layer and the next one.
        locked: share of each encoder's layers, from the first on, that are not trained.
        reason: the reason for these values, as a text for the user.
    """

    rows: int
    epochs: float
    lr: float
    layer_decay: float
    locked: float
    reason: str


# The least number of pairs for which each line is meant.
USUAL = {
    0: Usual(128, 20, 5e-5, 0.7, 0.5, "there are few pairs, so only late layers learn, at a high rate for few steps"),
    10_000: Usual(256, 10, 3e-5, 0.75, 0.0, "there are enough pairs for all layers; early layers learn slowly"),
    100_000: Usual(512, 5, 3e-5, 0.85, 0.0, "with many pairs few epochs are enough"),
    1_000_000: Usual(1024, 3, 3e-5, 0.9, 0.0, "with so many pairs the run is like a short pretraining"),
}


@dataclass(frozen=True, kw_only=True)
class ContrastSettings:
    """Length of the run and learning rates of the encoders. Values that are not given are chosen by the number of pairs."""

    epochs: Positive | None = None
    """Number of times that each pair is read, unless validation ends the run earlier."""
    steps: Count | None = None
    """Steps after which the run ends, instead of `epochs`, unless validation ends it earlier."""
    batch_size: Count | None = None
    """Number of pairs in a micro-batch on each rank. A step contrasts all pairs of its micro-batches and ranks."""
    accumulate: Count = 1
    """Number of micro-batches in a step. More micro-batches need less memory for the same number of pairs, but each is encoded
    twice."""
    lr: Positive | None = None
    """Highest learning rate of the last layers."""
    warmup: ShareBelowOne | None = None
    """Share of the run in which the learning rate rises."""
    layer_decay: PositiveShare | None = None
    """Factor of the learning rate between a layer and the next one; 1: the same rate in all layers."""
    locked: Share | None = None
    """Share of each encoder's layers, from the first on, that are not trained, 0 to 1."""
    weight_decay: NotNegative = 0.1
    """Weight decay: each step subtracts this share of a weight, times the learning rate."""
    patience: Count | None = 5
    """End the run after this many validations in a row without a new lowest loss; None: never."""
    alpha: Share = 1.0
    """Share of the tuned weights in the average with the old weights. 0.5 is the mean of both, which keeps more of the model's
    earlier abilities (WiSE-FT, arXiv 2109.01903); 1 uses only the tuned weights."""

    def __post_init__(self) -> None:
        check_numbers(self)
        if self.epochs is not None and self.steps is not None:
            raise UserError("both `steps` and `epochs` are given; give one of the two")


class Plan(NamedTuple):
    """The settings of a run with a known number of pairs.

    Attributes:
        rows: number of pairs that a step contrasts, over all micro-batches and ranks, which have `batch_size` pairs each.
        reason: the reason for the default values, as a text for the user.
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
    """Returns the default settings for a number of pairs."""
    least = sorted(USUAL)
    return USUAL[least[bisect_right(least, pairs) - 1]]


def plan(settings: ContrastSettings, pairs: int, width: int, ranks: int = 1) -> Plan:
    """Returns the given settings, completed by the defaults for the number of pairs.

    Args:
        pairs: number of pairs in the training split.
        width: width of the widest encoder that is trained.
        ranks: number of processes that train together.

    Raises UserError if there are fewer than two pairs.
    """
    if pairs < 2:
        raise UserError(f"{pairs} pairs to tune on: each pair is contrasted with others; import more pairs")
    own = usual(pairs)
    micro_batches = settings.accumulate * ranks
    # At most a quarter of all pairs: with larger steps there would be few, which contrast the same pairs again and again.
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
