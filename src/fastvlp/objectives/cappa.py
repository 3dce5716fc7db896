"""Captioning with parallel prediction, CapPa (arXiv 2306.07915, section 3): a text is predicted left to right, or all of it at
once from the image alone."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from fastvlp.batch import Batch
from fastvlp.config import Share
from fastvlp.data.tokenize import Tokenizer
from fastvlp.model.model import ModelConfig, VLModel
from fastvlp.objectives.ar import next_token_losses
from fastvlp.objectives.cloze_methods import predict_causal
from fastvlp.objectives.objective import ClozeMethod, Loss, Objective, ObjectiveConfig
from fastvlp.random import uniform

PARALLEL_SALT = 421


@dataclass(frozen=True, kw_only=True)
class CapPaConfig(ObjectiveConfig):
    """Predict each token from the image and the tokens before it. For a share of the texts, predict all tokens from only the
    image and the length of the text."""

    parallel: Share = 0.75
    """Share of the texts whose tokens are all predicted at once."""

    def build(self, model: ModelConfig, tokenizer: Tokenizer) -> CapPa:
        return CapPa(self, model)


class CapPa(Objective):
    """In a text that is predicted in parallel all inputs are the mask, and each sees all others.

    Not as published: the paper pads all texts to one length, so that the masks do not tell how long a text is. Here it is
    known, since padding is not encoded.
    """

    reading = "causal"
    cloze_context = "before"
    bos = "blind"
    reads_mask = True
    abilities = frozenset({"write"})

    def __init__(self, config: CapPaConfig, model: ModelConfig):
        super().__init__()
        self.config, self.mask = config, model.text.mask

    @property
    def cloze_method(self) -> ClozeMethod:
        return partial(predict_causal, bos="blind")

    def reaches_all(self, model: ModelConfig) -> bool:
        return model.reconstructor is None

    def parallel(self, batch: Batch) -> Tensor:
        """Draws the texts that are predicted in parallel: bool [B]."""
        return uniform(batch.seed, (1,), PARALLEL_SALT)[:, 0] < self.config.parallel

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        parallel, n = self.parallel(batch), batch.length - 1
        return {"next": (n * ~parallel).sum(), "parallel": (n * parallel).sum()}

    def forward(self, model: VLModel, image_BKD: Tensor, batch: Batch) -> dict[str, Loss]:
        parallel_B = self.parallel(batch)
        # The state at a position predicts the token after it, so that </s> is not read, and the last column not needed.
        L = batch.ids.shape[1] - 1
        position = torch.arange(L, device=batch.ids.device)
        read_BL = position < batch.length[:, None] - 1
        ids = torch.where(parallel_B[:, None], self.mask, batch.ids[:, :L])
        causal = position <= position[:, None]
        visible = torch.where(parallel_B[:, None, None], read_BL[:, None] | (position == 0), causal)
        state = model.read(image_BKD, ids, mask=visible[:, None])
        share = self.config.parallel
        targets = (read_BL & rows[:, None] for rows in (~parallel_B, parallel_B))
        left, together = next_token_losses(model, state, batch, *targets)
        # Weighted by their shares, as all tokens of a batch count alike in the paper.
        return {"next": replace(left, weight=1 - share), "parallel": replace(together, weight=share)}
