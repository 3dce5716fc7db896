"""Masked diffusion captioning (arXiv 2510.26799): tokens are masked at a rate drawn for each text, and predicted from the image
and the others."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastvlp.batch import Batch
from fastvlp.data.tokenize import Tokenizer
from fastvlp.model import masks
from fastvlp.model.model import ModelConfig, VLModel
from fastvlp.objectives.cloze_methods import predict_masked
from fastvlp.objectives.losses import head_loss, places, rows_at
from fastvlp.objectives.objective import ClozeMethod, Loss, Objective, ObjectiveConfig
from fastvlp.random import uniform

RATE_SALT, MASK_SALT = 431, 432


@dataclass(frozen=True, kw_only=True)
class MDCConfig(ObjectiveConfig):
    """Predict masked tokens, with a mask rate that is drawn for each text. A text's loss is divided by its rate, which makes it
    a bound of the likelihood under the linear schedule of masked diffusion (arXiv 2406.07524)."""

    least_rate: float = 0.0
    """Lowest mask rate. Above 0 it avoids texts with few masks, whose losses have a large weight."""
    most_rate: float = 1.0
    """Highest mask rate."""
    weighted: bool = True
    """Whether a text's loss is divided by its mask rate; otherwise all masked tokens have the same weight."""

    def __post_init__(self) -> None:
        if not 0 <= self.least_rate < self.most_rate <= 1:
            raise ValueError(
                f"`least_rate` {self.least_rate} and `most_rate` {self.most_rate}: shares, the first below the second"
            )

    def build(self, model: ModelConfig, tokenizer: Tokenizer) -> MDC:
        return MDC(self, model)


class MDC(Objective):
    reads_mask = True

    def __init__(self, config: MDCConfig, model: ModelConfig):
        super().__init__()
        self.config, self.mask = config, model.text.mask

    @property
    def cloze_method(self) -> ClozeMethod:
        return predict_masked

    def reaches_all(self, model: ModelConfig) -> bool:
        return model.reconstructor is None

    def rates(self, batch: Batch) -> Tensor:
        """The mask rate of each text, above 0: [B]."""
        low, high = self.config.least_rate, self.config.most_rate
        return high - uniform(batch.seed, (1,), RATE_SALT)[:, 0] * (high - low)

    def words(self, batch: Batch) -> Tensor:
        """Positions that may be masked: not <s>, </s> and padding. Bool [B L]."""
        position = torch.arange(batch.ids.shape[1], device=batch.ids.device)
        return (position >= 1) & (position < batch.length[:, None] - 1)

    def draw(self, batch: Batch) -> Tensor:
        """Draws the tokens that are masked: bool [B L]. A text may have no masked token; on average over draws the share is
        the rate."""
        noise = uniform(batch.seed, (batch.ids.shape[1],), MASK_SALT)
        return (noise < self.rates(batch)[:, None]) & self.words(batch)

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        # Divided by its rate, a text's loss is that of all its words in the mean over draws.
        return {"masked": (self.words(batch) if self.config.weighted else self.draw(batch)).sum()}

    def forward(self, model: VLModel, image_BKD: Tensor, batch: Batch) -> dict[str, Loss]:
        masked_BL = self.draw(batch)
        ids = torch.where(masked_BL, self.mask, batch.ids)
        state = model.read(image_BKD, ids, mask=masks.full(batch.length, ids.shape[1]))
        (place_T,) = places(masked_BL)
        nll = head_loss(model.head, rows_at(state, place_T), rows_at(batch.ids, place_T))
        if self.config.weighted:
            nll = nll / rows_at(self.rates(batch)[:, None].expand_as(ids), place_T)
        return {"masked": Loss(nll.sum(), self.counts(batch)["masked"])}
