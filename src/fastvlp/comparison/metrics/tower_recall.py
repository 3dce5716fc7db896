"""Retrieval recall of an arm's embeddings, among all images of the split and all captions of each."""

from __future__ import annotations

from fastvlp.comparison.metrics.interface import Metric, Score
from fastvlp.comparison.scored_data import caption_field, region_source, split_folder
from fastvlp.data.records.shards import Shards
from fastvlp.eval.embedding import embed_split
from fastvlp.eval.encoding import LoadedModel
from fastvlp.eval.ranks import retrieval
from fastvlp.eval.split_reading import read_captions
from fastvlp.training.state import TrainState


class TowerRecall(Metric):
    scores = (
        Score(
            "recall", "Retrieval", "mean of R@1, R@5 and R@10 in both directions, by the embeddings alone", percent=True
        ),
        Score(
            "image_to_text/r1",
            "Text R@1",
            "share of images for which one of their own captions comes first",
            percent=True,
        ),
        Score("text_to_image/r1", "Image R@1", "share of captions for which their own image comes first", percent=True),
    )
    order = 1

    def fits(self, state: TrainState) -> bool:
        return state.model.config.embed is not None

    def measure(self, state: TrainState) -> dict[str, float]:
        data = state.run.data
        shards = Shards(split_folder(data, self.options.split))
        loaded = LoadedModel(
            model=state.evaluated.model,
            tokenizer=state.tokenizer,
            batch_size=self.options.probe_batch,
            max_length=data.max_length,
            fit=data.fit,
            regions=region_source(data),
            precision=state.precision,
        )
        captions = read_captions(shards, caption_field(data))
        result = retrieval(*embed_split(loaded, shards, captions))
        self.images = {score.name: len(captions) for score in self.scores}
        self.errors = {score.name: result.errors[score.name] for score in self.scores if score.name in result.errors}
        self.chance = {score.name: result.chance[score.name] for score in self.scores}
        return {score.name: result.scores[score.name] for score in self.scores}
