"""PrefixLM: a prefix is read in both directions, the rest is predicted left to right (SimVLM, arXiv 2108.10904, section 3.1;
FLM, arXiv 2303.14038, figure 2)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastvlp.batch import Batch
from fastvlp.data.tokenize import Tokenizer
from fastvlp.model import masks
from fastvlp.model.model import ModelConfig, VLModel
from fastvlp.objectives.ar import next_token_loss
from fastvlp.objectives.cloze_methods import predict_causal
from fastvlp.objectives.objective import ClozeMethod, Loss, Objective, ObjectiveConfig
from fastvlp.random import uniform

PREFIX_SALT = 301


@dataclass(frozen=True, kw_only=True)
class PrefixLMConfig(ObjectiveConfig):
    """Read a prefix of the text in both directions, and predict the rest left to right."""

    suffix_rate: float | None = None
    """Share of the tokens after <s> that are predicted, at least one token. By default it is drawn uniformly for each text; the
    papers do not say how they draw it."""

    def __post_init__(self) -> None:
        if self.suffix_rate is not None and not 0 < self.suffix_rate <= 1:
            raise ValueError(f"`suffix_rate` is a share, above 0 and up to 1, not {self.suffix_rate}")

    def build(self, model: ModelConfig, tokenizer: Tokenizer) -> PrefixLM:
        return PrefixLM(self)


class PrefixLM(Objective):
    bos = "blind"
    abilities = frozenset({"write"})
    cloze_context = "before"

    def __init__(self, config: PrefixLMConfig):
        super().__init__()
        self.config = config

    @property
    def cloze_method(self) -> ClozeMethod:
        return predict_causal

    def reaches_all(self, model: ModelConfig) -> bool:
        return model.reconstructor is None

    def prefix(self, batch: Batch) -> Tensor:
        """Number of tokens after <s> that are read in both directions: [B], 0 to M-1 of the M tokens after <s>."""
        M = batch.length - 1
        rate = self.config.suffix_rate
        share = (
            uniform(batch.seed, (1,), PREFIX_SALT)[:, 0]
            if rate is None
            else torch.full_like(M, rate, dtype=torch.float)
        )
        return torch.minimum(((1 - share) * M).round().long(), M - 1).clamp(min=0)

    def _targets(self, batch: Batch) -> Tensor:
        """Positions whose next token is predicted: bool [B L]."""
        position = torch.arange(batch.ids.shape[1], device=batch.ids.device)
        return (position >= self.prefix(batch)[:, None]) & (position < batch.length[:, None] - 1)

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        return {"next": self._targets(batch).sum()}

    def forward(self, model: VLModel, image_BKD: Tensor, batch: Batch) -> dict[str, Loss]:
        mask = masks.prefix(batch.length, self.prefix(batch), batch.ids.shape[1])
        state = model.read(image_BKD, batch.ids, mask=mask)
        return {"next": next_token_loss(model, state, batch, self._targets(batch))}
