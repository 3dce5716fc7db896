"""Autoregressive language modeling: each token from the image and the tokens before it (spec flm.md 2.3)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from fastvlp.batch import Batch
from fastvlp.data.tokenize import Tokenizer
from fastvlp.model.model import Bos, ModelConfig, VLModel
from fastvlp.objectives.cloze_methods import predict_causal
from fastvlp.objectives.losses import head_loss
from fastvlp.objectives.objective import ClozeMethod, Loss, Objective, ObjectiveConfig


@dataclass(frozen=True, kw_only=True)
class ARConfig(ObjectiveConfig):
    """bos: `blind` starts from a <s> that sees no text, so that the first word is learned from the image; `official`
    (the released FLM's baseline) lets <s> see all, hides it from the others and never asks for the first word."""

    bos: Bos = "blind"

    def build(self, model: ModelConfig, tokenizer: Tokenizer) -> AR:
        return AR(self)


def next_token_loss(model: VLModel, state_BLD: Tensor, batch: Batch, ask_BL: Tensor) -> Loss:
    """Cross-entropy of x_{i+1} at the asked positions i."""
    nll = head_loss(model.causal_head, state_BLD[ask_BL], batch.ids.roll(-1, 1)[ask_BL])
    return Loss(nll.sum(), ask_BL.sum())


class AR(Objective):
    reading = "causal"
    abilities = frozenset({"write"})

    def __init__(self, config: ARConfig):
        super().__init__()
        self.config = config
        self.bos = config.bos

    @property
    def cloze_method(self) -> ClozeMethod:
        return partial(predict_causal, bos=self.config.bos)

    def reaches_all(self, model: ModelConfig) -> bool:
        return model.reconstructor is None

    def _asked(self, batch: Batch) -> Tensor:
        position = torch.arange(batch.ids.shape[1], device=batch.ids.device)
        first = 0 if self.config.bos == "blind" else 1
        return (position >= first) & (position < batch.length[:, None] - 1)

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        return {"next": self._asked(batch).sum()}

    def forward(self, model: VLModel, image_BKD: Tensor, batch: Batch) -> dict[str, Loss]:
        state = model.read_causally(image_BKD, batch.ids, batch.length, bos=self.config.bos)
        return {"next": next_token_loss(model, state, batch, self._asked(batch))}
