"""Autoregressive language modeling: each token is predicted from the image and the tokens before it, as the AR baseline of FLM
(arXiv 2303.14038, section 4.2)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from fastvlp.batch import Batch
from fastvlp.data.tokenize import Tokenizer
from fastvlp.model.model import Bos, ModelConfig, VLModel
from fastvlp.objectives.cloze_methods import predict_causal
from fastvlp.objectives.losses import head_loss, places, rows_at
from fastvlp.objectives.objective import ClozeMethod, Loss, Objective, ObjectiveConfig


@dataclass(frozen=True, kw_only=True)
class ARConfig(ObjectiveConfig):
    """Predict each token from the image and the tokens before it."""

    bos: Bos = "blind"
    """The tokens that <s> attends to. blind: no text, so that the first word is predicted from the image. official, as in FLM's
    released baseline: the whole text, while no other token attends to <s>, and the first word is not predicted."""

    def build(self, model: ModelConfig, tokenizer: Tokenizer) -> AR:
        return AR(self)


def next_token_loss(model: VLModel, state_BLD: Tensor, batch: Batch, target_BL: Tensor) -> Loss:
    """Cross-entropy of the token after each position that `target_BL` marks. Both may leave out the last column."""
    return next_token_losses(model, state_BLD, batch, target_BL)[0]


def next_token_losses(model: VLModel, state_BLD: Tensor, batch: Batch, *target_BL: Tensor) -> list[Loss]:
    """The same for several sets of positions, in one call of the head."""
    following_BL, each = batch.ids.roll(-1, 1)[:, : state_BLD.shape[1]], places(*target_BL)
    place_T = torch.cat(each)
    nll_T = head_loss(model.causal_head, rows_at(state_BLD, place_T), rows_at(following_BL, place_T))
    parts = nll_T.split([*map(len, each)])
    return [Loss(part.sum(), target.sum()) for part, target in zip(parts, target_BL)]


class AR(Objective):
    reading = "causal"
    cloze_context = "before"
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

    def _targets(self, batch: Batch) -> Tensor:
        """Positions whose next token is predicted: bool [B L]."""
        position = torch.arange(batch.ids.shape[1], device=batch.ids.device)
        first = 0 if self.config.bos == "blind" else 1
        return (position >= first) & (position < batch.length[:, None] - 1)

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        return {"next": self._targets(batch).sum()}

    def forward(self, model: VLModel, image_BKD: Tensor, batch: Batch) -> dict[str, Loss]:
        # </s> predicts nothing and, unless <s> sees the whole text, is seen by no other token.
        ids = batch.ids[:, :-1] if self.config.bos == "blind" else batch.ids
        state = model.read_causally(image_BKD, ids, batch.length, bos=self.config.bos)
        return {"next": next_token_loss(model, state, batch, self._targets(batch)[:, : ids.shape[1]])}
