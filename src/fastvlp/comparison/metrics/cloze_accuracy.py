"""Cloze accuracy: the share of the words of the captions that an arm predicts right, from all other words or from those before.

Arms are compared only where they read the same: FLM is measured in both ways, MLM in the first, AR in the second.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import cast

from fastvlp.comparison.metrics.interface import Metric, Score
from fastvlp.comparison.scored_data import validation_pairs
from fastvlp.eval.cloze import cloze
from fastvlp.objectives.objective import ClozeMethod, Objective
from fastvlp.training.state import TrainState, autocast


class ClozeAccuracy(Metric):
    scores = (
        Score("cloze", "Cloze accuracy", "each word from the image and all other words", percent=True),
        Score("next_word", "Next-word accuracy", "each word from the image and the words before it", percent=True),
    )
    order = 0

    def fits(self, state: TrainState) -> bool:
        return bool(cloze_methods(state))

    def measure(self, state: TrainState) -> dict[str, float]:
        values = {}
        for name, method in cloze_methods(state).items():
            if not self.options.measures(name):
                continue
            pairs = validation_pairs(state, self.options, self.options.cloze_items)
            with autocast(state):
                result = cloze(state.evaluated.model, method, pairs)
            values[name] = result.accuracy
            self.images[name] = result.texts
            if not math.isnan(result.error):
                self.errors[name] = result.error
        return values


def cloze_methods(state: TrainState) -> dict[str, ClozeMethod]:
    """Returns the methods by which the arm predicts single words, by score. The first objective that trains a method gives
    it."""
    methods: dict[str, ClozeMethod] = {}
    for objective in cast(Mapping[str, Objective], state.pretraining.objectives).values():
        both = objective.cloze_method if objective.cloze_context == "both" else None
        for name, method in (("cloze", both), ("next_word", objective.next_word_method)):
            if method is not None:
                methods.setdefault(name, method)
    return methods
