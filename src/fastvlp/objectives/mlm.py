"""Masked language modeling: corrupted tokens are predicted from the image and the other tokens (BERT, arXiv 1810.04805, section
3.1; METER, arXiv 2111.02387)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastvlp.batch import Batch
from fastvlp.config import Share
from fastvlp.data.tokenize import Tokenizer
from fastvlp.errors import UserError
from fastvlp.model import masks
from fastvlp.model.model import ModelConfig, VLModel
from fastvlp.model.region_embedding import random_hide, require_regions
from fastvlp.objectives.cloze_methods import predict_masked
from fastvlp.objectives.losses import head_loss, places, rows_at, token_loss
from fastvlp.objectives.objective import ClozeMethod, Loss, Objective, ObjectiveConfig
from fastvlp.random import uniform

MASK_SALT, PREDICT_SALT, KIND_SALT, WORD_SALT = 401, 402, 403, 404


@dataclass(frozen=True, kw_only=True)
class MLMConfig(ObjectiveConfig):
    """Predict corrupted tokens from the image and the other tokens. At least one token of each text is corrupted and
    predicted."""

    baseline = True

    mask_rate: float = 0.4
    """Share of the words that are corrupted (of the tokens, without `whole_word`)."""
    predict_rate: float | None = None
    """Share of all tokens that are predicted, at most mask_rate; by default all corrupted tokens."""
    keep_mask: Share = 0.8
    """Share of the corrupted tokens that are replaced by the mask token."""
    keep_random: Share = 0.1
    """Share of the corrupted tokens that are replaced by a random token. The others are not replaced."""
    whole_word: bool = True
    """Corrupt all tokens of a word together."""
    region_rate: float = 0.0
    """In a single stream, share of the regions that are hidden at the same time; 0 is UNITER's conditional masking (arXiv
    1909.11740, section 3.2)."""

    def __post_init__(self) -> None:
        if not 0 < self.mask_rate <= 1:
            raise ValueError(f"`mask_rate` is a share, above 0 and up to 1, not {self.mask_rate}")
        if self.predict_rate is not None and not 0 < self.predict_rate <= self.mask_rate:
            raise ValueError(
                f"`predict_rate` must be above 0 and at most mask_rate {self.mask_rate}, not {self.predict_rate}"
            )
        if not 0 <= self.region_rate <= 1:
            raise ValueError(f"`region_rate` is a share, 0 to 1, not {self.region_rate}")
        if self.keep_mask + self.keep_random > 1:
            raise ValueError("`keep_mask` and `keep_random` are shares of the corrupted tokens: together at most 1")

    def build(self, model: ModelConfig, tokenizer: Tokenizer) -> MLM:
        if self.region_rate and model.single is None:
            raise UserError(
                "`region_rate` hides regions, but this model does not read regions with words; set `model.single`, or "
                "leave it at 0"
            )
        return MLM(self, model, tokenizer.starts_word)


class MLM(Objective):
    reads_mask = True
    starts_word: Tensor
    ordinary: Tensor

    def __init__(self, config: MLMConfig, model: ModelConfig, starts_word_V: Tensor):
        super().__init__()
        self.config = config
        self.mask, self.vocab = model.text.mask, model.text.vocab
        self.register_buffer("starts_word", starts_word_V, persistent=False)
        specials = {model.text.pad, model.text.bos, model.text.eos, model.text.mask}
        ordinary = torch.tensor([i for i in range(model.text.vocab) if i not in specials])
        self.register_buffer("ordinary", ordinary, persistent=False)

    @property
    def cloze_method(self) -> ClozeMethod:
        return predict_masked

    def reaches_all(self, model: ModelConfig) -> bool:
        return model.reconstructor is None

    def draw(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Draws the tokens that are corrupted, and those that are predicted: two bool [B L]; never <s>, </s> or padding."""
        c, L = self.config, batch.ids.shape[1]
        position, n = torch.arange(L, device=batch.ids.device), batch.length[:, None]
        word = (position >= 1) & (position < n - 1)
        noise = uniform(batch.seed, (L,), MASK_SALT)
        if c.whole_word:
            starts = self.starts_word[batch.ids] | (position == 1)
            # Each piece has the noise of the position where its word starts.
            noise = noise.gather(1, torch.where(starts & word, position, 0).cummax(1).values)
        noise = noise.masked_fill(~word, 2.0)
        corrupted = ((noise < c.mask_rate) | (noise == noise.min(1, keepdim=True).values)) & word
        if c.predict_rate is None:
            return corrupted, corrupted
        chance = uniform(batch.seed, (L,), PREDICT_SALT).masked_fill(~corrupted, 2.0)
        return corrupted, corrupted & (
            (chance < c.predict_rate / c.mask_rate) | (chance == chance.min(1, keepdim=True).values)
        )

    def corrupt(self, batch: Batch, corrupted: Tensor) -> Tensor:
        """The ids with the corrupted tokens replaced: [B L]."""
        c, L = self.config, batch.ids.shape[1]
        kind = uniform(batch.seed, (L,), KIND_SALT)
        pick = (uniform(batch.seed, (L,), WORD_SALT) * len(self.ordinary)).long().clamp(max=len(self.ordinary) - 1)
        ids = torch.where(corrupted & (kind < c.keep_mask), self.mask, batch.ids)
        random = corrupted & (kind >= c.keep_mask) & (kind < c.keep_mask + c.keep_random)
        return torch.where(random, self.ordinary[pick], ids)

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        return {"masked": self.draw(batch)[1].sum()}

    def forward(self, model: VLModel, image_BKD: Tensor, batch: Batch) -> dict[str, Loss]:
        corrupted, target_BL = self.draw(batch)
        ids, rate = self.corrupt(batch, corrupted), self.config.region_rate
        hidden = random_hide(batch.seed, require_regions(batch.regions).mask, rate) if rate else None
        return {"masked": masked_loss(model, image_BKD, batch, ids, target_BL, hidden)}


def masked_loss(
    model: VLModel,
    image_BKD: Tensor,
    batch: Batch,
    ids_BL: Tensor,
    target_BL: Tensor,
    hidden_BR: Tensor | None = None,
) -> Loss:
    """Cross-entropy of the batch's ids at the positions that `target_BL` marks. The model reads `ids_BL` and, in a single
    stream, the regions that are not hidden."""
    (place_T,) = places(target_BL)
    target_T = rows_at(batch.ids, place_T)
    if model.config.single is not None:
        joint = model.read_regions(image_BKD, batch.regions, ids_BL, batch.length, hidden_BR=hidden_BR)
        words = model.single.words
        nll = token_loss(words.hidden(rows_at(joint.text, place_T)), model.text.word_table, words.bias, target_T)
    else:
        state = model.read(image_BKD, ids_BL, mask=masks.full(batch.length, ids_BL.shape[1]))
        nll = head_loss(model.head, rows_at(state, place_T), target_T)
    return Loss(nll.sum(), target_BL.sum())
