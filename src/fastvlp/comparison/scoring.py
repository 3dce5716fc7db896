"""Scoring the arms of a comparison by every metric that fits them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from fastvlp.comparison.metrics.interface import Metric, known_scores, metric_types
from fastvlp.comparison.results import Sample, Scored
from fastvlp.comparison.samples import make_samples
from fastvlp.comparison.scored_data import validation_pairs
from fastvlp.comparison.scoring_options import ScoringOptions
from fastvlp.comparison.short_finetuning import ShortFinetuning
from fastvlp.errors import UserError
from fastvlp.eval.uncertainty import error_at_the_end
from fastvlp.tasks.items import batches_in_order
from fastvlp.training.state import TrainState

Number = TypeVar("Number", int, float)


def chosen_metrics(options: ScoringOptions) -> list[type[Metric]]:
    """The metrics that give some of the scores that are measured. Raises UserError for a score that there is not."""
    if unknown := {*options.scores} - known_scores().keys():
        raise UserError(f"`scores`: there is no {min(unknown)}; there are {', '.join(known_scores())}")
    return [metric for metric in metric_types() if any(options.measures(score.name) for score in metric.scores)]


def errors_at_the_ends(metric: Metric, values: Mapping[str, float]) -> dict[str, float]:
    """Standard errors of the shares that are exactly 0 or 1, for which the metric found an error of 0: few items are often all
    wrong or all right, and that does not make such a score certain."""
    shares = [score.name for score in metric.scores if score.percent and values.get(score.name) in (0.0, 1.0)]
    return {
        name: error_at_the_end(metric.images[name])
        for name in shares
        if name in metric.images and metric.errors.get(name) == 0
    }


class MetricScorer:
    """Scores arms. Their states are not changed: what is fine-tuned before a score is a copy."""

    def __init__(self, options: ScoringOptions) -> None:
        self.options = options
        self.finetuning = ShortFinetuning(options=options)
        self.metrics = [metric(self.finetuning) for metric in chosen_metrics(options)]
        # A mixture of data has no hash.
        self._checked: list[Any] = []

    def check(self, state: TrainState) -> None:
        """Reads the pairs and questions on which an arm is scored once. Raises UserError if one cannot be used."""
        key = (state.run.data, state.run.tokenizer, state.run.text, state.model.config.image)
        if key in self._checked:
            return
        self._checked.append(key)
        for _ in validation_pairs(state, self.options):
            pass
        tunes = any(metric.tunes for metric in self.metrics)
        if tunes and (questions := self.finetuning.questions(state)) is not None:
            for _ in batches_in_order(questions.held_out, self.options.probe_batch, "cpu"):
                pass

    def score(self, state: TrainState, *, tuned: bool = True) -> Scored:
        """The scores of an arm by all metrics that fit it; without `tuned`, by those that fine-tune nothing."""
        scored = Scored()
        for metric in self.metrics:
            if metric.fits(state) and (tuned or not metric.tunes):
                metric.errors, metric.chance, metric.blind, metric.images = {}, {}, {}, {}
                values = metric.measure(state)
                scored.values.update(self._chosen(values))
                scored.errors.update(self._chosen(metric.errors | errors_at_the_ends(metric, values)))
                scored.chance.update(self._chosen(metric.chance))
                scored.blind.update(self._chosen(metric.blind))
                scored.images.update(self._chosen(metric.images))
        return scored

    def _chosen(self, numbers: Mapping[str, Number]) -> dict[str, Number]:
        """Those of the scores that are measured: a metric may give further ones."""
        return {name: number for name, number in numbers.items() if self.options.measures(name)}

    def samples(self, states: Mapping[str, TrainState]) -> list[Sample]:
        """Pictures with the captions and answers of each arm, whose last scoring was just before."""
        return make_samples(states, self.finetuning)
