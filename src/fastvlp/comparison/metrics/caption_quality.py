"""CIDEr of greedy captions after a short fine-tuning on captions, the same for every arm."""

from __future__ import annotations

from fastvlp.comparison.metrics.interface import Metric, Score
from fastvlp.comparison.scored_data import reference_captions
from fastvlp.tasks import caption
from fastvlp.training.state import TrainState


class CaptionQuality(Metric):
    scores = (Score("cider", "CIDEr", "of greedy captions after the same short fine-tuning"),)
    order = 3
    tunes = True

    def fits(self, state: TrainState) -> bool:
        return state.model.config.fusion is not None and self.options.caption_items > 0

    def measure(self, state: TrainState) -> dict[str, float]:
        count = self.options.caption_items
        captions = self.finetuning.captions(state, count)
        references = reference_captions(state.run, self.options.split)[:count]
        self.images["cider"] = len(references)
        return {"cider": caption.scores(captions, references)["cider"]}
