"""Contrastive learning of two towers over the rows of all ranks (CLIP, arXiv 2103.00020, figure 3; FLIP, 2212.00794)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from fastvlp.batch import Batch
from fastvlp.data.tokenize import Tokenizer
from fastvlp.model.model import ModelConfig, VLModel
from fastvlp.objectives.contrastive import clamp_log_scale, clipped_scale, info_nce
from fastvlp.objectives.objective import Loss, PairObjective, constant
from fastvlp.objectives.pair_embedding import PairsConfig, embed_pair, pair_contents


@dataclass(frozen=True, kw_only=True)
class CLIPConfig(PairsConfig):
    """Find each image's own text among the texts of all rows, and each text's own image."""

    temperature: float = 0.07
    """Initial temperature. It is learned, as the logarithm of its inverse, which is the scale of the logits."""
    max_scale: float = 100.0
    """Largest scale of the logits."""
    bound: Literal["clamp", "clip"] = "clamp"
    """How the scale is limited: clamp limits the parameter after each step (CLIP); clip limits it in the loss, so that its
    gradient is zero beyond the limit (FLIP)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        # The scale stays within 1 and max_scale: beyond them it would jump, or learn nothing.
        if not 0 < 1 / self.max_scale <= self.temperature <= 1:
            raise ValueError(
                f"`temperature` {self.temperature} must be from 1 / max_scale, {1 / self.max_scale:g}, to 1"
            )

    def build(self, model: ModelConfig, tokenizer: Tokenizer) -> CLIP:
        self.check(model)
        return CLIP(self)


class CLIP(PairObjective):
    image_use = "embedding"

    def __init__(self, config: CLIPConfig):
        super().__init__()
        self.config = config
        self.text_use = config.text_use
        self.log_scale = nn.Parameter(torch.tensor(-math.log(config.temperature)))

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        return dict.fromkeys(("image", "text"), constant(len(batch), batch.length))

    def chance_losses(self, rows: int) -> Mapping[str, float]:
        return dict.fromkeys(("image", "text"), math.log(rows))

    def embed(self, model: VLModel, image_BKD: Tensor, batch: Batch) -> tuple[Tensor, ...]:
        return embed_pair(model, image_BKD, batch, self.config, drops_parts=self.drops_parts)

    def constants(self, model: VLModel, batch: Batch) -> tuple[Tensor, ...]:
        return pair_contents(batch, self.config)

    def scale(self) -> Tensor:
        clip = self.config.bound == "clip"
        return clipped_scale(self.log_scale, self.config.max_scale) if clip else self.log_scale.exp()

    def score(self, *rows: Tensor) -> dict[str, Loss]:
        """Returns the losses of finding each image's text among the texts of all ranks, and each text's image among the images.
        Their mean is CLIP's loss."""
        image_BE, text_BE, *contents = rows
        (images, first), (texts, _) = self.gather_rows(image_BE), self.gather_rows(text_BE)
        own = first + torch.arange(len(image_BE), device=image_BE.device)
        count, scale, content = constant(len(own), own), self.scale(), self.gather_contents(*contents)
        image, text = (
            info_nce(query_BE, keys, own, scale, content=content).sum()
            for query_BE, keys in ((image_BE, texts), (text_BE, images))
        )
        weight = self.config.weight / 2
        return {"image": Loss(image, count, weight), "text": Loss(text, count, weight)}

    def after_step(self, model: VLModel) -> None:
        if self.config.bound == "clamp":
            clamp_log_scale(self.log_scale, self.config.max_scale)
