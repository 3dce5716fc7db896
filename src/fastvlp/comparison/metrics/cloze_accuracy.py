"""Cloze accuracy: the share of the words of the captions that an arm predicts right by the method that it was trained for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from fastvlp.comparison.metrics.interface import Metric, Score
from fastvlp.comparison.scored_data import validation_pairs
from fastvlp.eval.cloze import cloze
from fastvlp.objectives.objective import ClozeMethod, Objective
from fastvlp.training.state import TrainState, autocast


class ClozeAccuracy(Metric):
    scores = (
        Score(
            "cloze",
            "Cloze accuracy",
            "from the words on both sides for FLM and MLM, from those before it for AR and PrefixLM",
            percent=True,
        ),
    )
    order = 1

    def fits(self, state: TrainState) -> bool:
        return own_cloze_method(state) is not None

    def measure(self, state: TrainState) -> dict[str, float]:
        method = own_cloze_method(state)
        assert method is not None
        pairs = validation_pairs(state, self.options, self.options.cloze_items)
        with autocast(state):
            return {"cloze": cloze(state.evaluated.model, method, pairs).accuracy}


def own_cloze_method(state: TrainState) -> ClozeMethod | None:
    """How the arm predicts single words: as the first of its objectives that learns to; None if none does."""
    objectives = cast(Mapping[str, Objective], state.pretraining.objectives).values()
    return next((method for objective in objectives if (method := objective.cloze_method) is not None), None)
