"""Accuracy in visual question answering after a short fine-tuning, the same for every arm."""

from __future__ import annotations

from fastvlp.comparison.metrics.interface import Metric, Score
from fastvlp.tasks import vqa
from fastvlp.training.state import TrainState, autocast


class VQAAccuracy(Metric):
    scores = (Score("vqa", "VQA accuracy", "after the same short fine-tuning", percent=True),)
    order = 2
    tunes = True

    def fits(self, state: TrainState) -> bool:
        return state.model.config.fusion is not None and self.finetuning.questions(state) is not None

    def measure(self, state: TrainState) -> dict[str, float]:
        questions = self.finetuning.questions(state)
        assert questions is not None
        tuned = self.finetuning.tune_for_questions(state, questions)
        with autocast(state):
            batch = 4 * self.options.probe_batch
            scores = vqa.measure(tuned.model, tuned.objective, questions.data.answers, questions.held_out, batch)
        self.chance["vqa"] = scores["chance"]
        if questions.blind is not None:
            self.blind["vqa"] = questions.blind.blind
        self.images["vqa"] = len({item.record for item in questions.held_out.items})
        # Questions about a single image have none.
        if "standard_error" in scores:
            self.errors["vqa"] = scores["standard_error"]
        return {"vqa": scores["accuracy"]}
