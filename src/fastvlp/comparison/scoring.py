"""Scoring the arms of a comparison by every metric that fits them."""

from __future__ import annotations

from collections.abc import Mapping

from fastvlp.comparison.metrics.interface import metric_types
from fastvlp.comparison.results import Sample
from fastvlp.comparison.samples import make_samples
from fastvlp.comparison.scoring_options import ScoringOptions
from fastvlp.comparison.short_finetuning import ShortFinetuning
from fastvlp.training.state import TrainState


class MetricScorer:
    """Scores arms. Their states are not changed: what is fine-tuned before a score is a copy."""

    def __init__(self, options: ScoringOptions) -> None:
        self.options = options
        self.finetuning = ShortFinetuning(options=options)
        self.metrics = [metric(self.finetuning) for metric in metric_types()]

    def score(self, state: TrainState) -> dict[str, float]:
        """The scores of an arm by all metrics that fit it, by name."""
        scores: dict[str, float] = {}
        for metric in self.metrics:
            if metric.fits(state):
                scores |= metric.measure(state)
        return scores

    def samples(self, states: Mapping[str, TrainState]) -> list[Sample]:
        """Pictures with the captions and answers of each arm, whose last scoring was just before."""
        return make_samples(states, self.finetuning)
