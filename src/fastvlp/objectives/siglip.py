"""Contrastive learning with a sigmoid for each image and text, in place of a softmax over the batch (SigLIP, arXiv
2303.15343)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastvlp.batch import Batch
from fastvlp.config import Positive
from fastvlp.data.tokenize import Tokenizer
from fastvlp.model.model import ModelConfig, VLModel
from fastvlp.objectives.contrastive import sigmoid_loss
from fastvlp.objectives.objective import Loss, PairObjective, constant
from fastvlp.objectives.pair_embedding import PairsConfig, embed_pair, pair_contents


@dataclass(frozen=True, kw_only=True)
class SigLIPConfig(PairsConfig):
    """Decide for each image and each text of all rows whether they belong together."""

    scale: Positive = 10.0
    """Initial scale of the logits (arXiv 2303.15343, section 3.2); it is learned."""
    bias: float = -10.0
    """Initial bias of the logits; it is learned."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scale <= 0:
            raise ValueError(f"`scale` must be above 0, not {self.scale}")

    def build(self, model: ModelConfig, tokenizer: Tokenizer) -> SigLIP:
        self.check(model)
        return SigLIP(self)


class SigLIP(PairObjective):
    image_use = "embedding"

    def __init__(self, config: SigLIPConfig):
        super().__init__()
        self.config = config
        self.text_use = config.text_use
        self.log_scale = nn.Parameter(torch.tensor(math.log(config.scale)))
        self.bias = nn.Parameter(torch.tensor(config.bias))

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        return {"pairs": constant(len(batch), batch.length)}

    def embed(self, model: VLModel, image_BKD: Tensor, batch: Batch) -> tuple[Tensor, ...]:
        return embed_pair(model, image_BKD, batch, self.config, drops_parts=self.drops_parts)

    def constants(self, model: VLModel, batch: Batch) -> tuple[Tensor, ...]:
        return pair_contents(batch, self.config)

    def score(self, *rows: Tensor) -> dict[str, Loss]:
        """The loss of each image with the texts of all ranks; it is divided by the number of images, as in algorithm 1."""
        image_BE, text_BE, *contents = rows
        texts, first = self.gather_rows(text_BE)
        own = first + torch.arange(len(image_BE), device=image_BE.device)
        content = self.gather_contents(*contents)
        loss = sigmoid_loss(image_BE, texts, own, self.log_scale.exp(), self.bias, content=content)
        return {"pairs": Loss(loss.sum(), constant(len(own), own), self.config.weight)}
