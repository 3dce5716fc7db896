"""The interface of a metric, with which the arms of a comparison are scored.

Your own metric is a subclass in a file that is imported. It is measured and reported like the metrics of the package.
"""

from __future__ import annotations

import abc
from typing import ClassVar, NamedTuple

from fastvlp.comparison.short_finetuning import ShortFinetuning
from fastvlp.extensions import variants
from fastvlp.training.state import TrainState


class Score(NamedTuple):
    """A number that a metric measures for each arm. Higher is better.

    Attributes:
        name: key of the score in results.json.
        title: heading of the score in the report.
        note: how the score was measured, as a phrase that follows the title.
        percent: whether the score is a share from 0 to 1, which is shown in per cent.
    """

    name: str
    title: str
    note: str = ""
    percent: bool = False


class Metric(abc.ABC):
    """A measurement of an arm. It must not change the arm's state.

    Attributes:
        scores: the scores that the metric measures.
        order: position of its scores in the report, lowest first. The first score is the headline.
        tunes: whether a copy of the arm is fine-tuned first. Such a metric is measured at a few marks only.
        errors: standard errors of the last measurement, by score, if known.
        chance: score of guessing, by score, if known.
        blind: score from the texts alone, without images, by score, if known.
        images: number of images that were scored, by score, if known.
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
        """Whether an arm can be measured. This depends on its model, its objectives and its data."""

    @abc.abstractmethod
    def measure(self, state: TrainState) -> dict[str, float]:
        """Returns the value of each of `scores`, by name."""


def metric_types() -> list[type[Metric]]:
    """Returns all metrics, in the order of the report."""
    metrics = variants(Metric, "fastvlp.comparison.metrics")
    return sorted(metrics, key=lambda metric: metric.order)


def known_scores() -> dict[str, Score]:
    """Returns the scores of all metrics by name, in the order of the report."""
    return {score.name: score for metric in metric_types() for score in metric.scores}
