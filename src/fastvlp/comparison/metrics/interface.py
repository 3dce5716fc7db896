"""The interface of a metric by which the arms of a comparison are scored.

A metric of your own is a subclass in a file that is imported: it is then measured and reported like those of the package.
"""

from __future__ import annotations

import abc
from typing import ClassVar, NamedTuple

from fastvlp.comparison.short_finetuning import ShortFinetuning
from fastvlp.extensions import variants
from fastvlp.training.state import TrainState


class Score(NamedTuple):
    """A number that a metric gives each arm; higher is better.

    Attributes:
        name: its key in results.json.
        title: its heading in the report.
        note: how it was measured, as the end of a sentence about the title.
        percent: whether it is a share in 0..1, to be shown in per cent.
    """

    name: str
    title: str
    note: str = ""
    percent: bool = False


class Metric(abc.ABC):
    """A measurement of an arm. It must not change the arm's state.

    Attributes:
        scores: the numbers that it gives.
        order: the place of its scores in the report, which begins with the lowest; the first one is the headline.
        tunes: whether a copy of the arm is fine-tuned first, so that it is measured at a few marks alone.
        errors: standard errors of the last measurement, by score, as far as they are known.
        chance: what guessing would score, by score, as far as that is known.
        blind: what the texts alone would score, without images, by score, as far as that is known.
        images: how many images were scored, by score, as far as that is known.
    """

    scores: ClassVar[tuple[Score, ...]]
    order: ClassVar[int] = 100
    tunes: ClassVar[bool] = False

    def __init__(self, finetuning: ShortFinetuning) -> None:
        self.finetuning = finetuning
        self.options = finetuning.options
        self.errors: dict[str, float] = {}
        self.chance: dict[str, float] = {}
        self.blind: dict[str, float] = {}
        self.images: dict[str, int] = {}

    @abc.abstractmethod
    def fits(self, state: TrainState) -> bool:
        """Whether an arm can be measured, by its model, its objectives and its data."""

    @abc.abstractmethod
    def measure(self, state: TrainState) -> dict[str, float]:
        """The value of each of `scores`, by name."""


def metric_types() -> list[type[Metric]]:
    """All metrics, in the order of the report."""
    found = variants(Metric, "fastvlp.comparison.metrics")
    return sorted(found, key=lambda metric: metric.order)


def known_scores() -> dict[str, Score]:
    """The scores of all metrics by name, in the order of the report."""
    return {score.name: score for metric in metric_types() for score in metric.scores}
