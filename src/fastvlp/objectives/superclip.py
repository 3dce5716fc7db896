"""Words of the caption predicted from the image by one linear layer (SuperCLIP, arXiv 2512.14480, section 3), beside a
contrastive loss."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvlp.batch import Batch
from fastvlp.config import NotNegative
from fastvlp.data.tokenize import Tokenizer
from fastvlp.errors import UserError
from fastvlp.model.layers import initialise
from fastvlp.model.model import ModelConfig, VLModel
from fastvlp.objectives.losses import at_least_fp32
from fastvlp.objectives.objective import Loss, Objective, ObjectiveConfig


@dataclass(frozen=True, kw_only=True)
class SuperCLIPConfig(ObjectiveConfig):
    """Predict which words are in the caption, from the mean of the image's states. Rare words have more weight."""

    weight: NotNegative = 1.0
    """Weight of the loss, relative to the contrastive loss."""
    rare_words: bool = True
    """Whether a word's weight is the logarithm of its inverse frequency in texts; otherwise all words have the same weight."""

    def build(self, model: ModelConfig, tokenizer: Tokenizer) -> SuperCLIP:
        if model.single is not None:
            raise UserError("superclip needs the states of an image encoder, but a single stream reads regions")
        return SuperCLIP(self, model)


def inverse_frequencies(texts_with_V: Tensor, texts: int) -> Tensor:
    """Weights of the words [V]: log(texts / (1 + texts that have the word)), at least 0 (section 3.2)."""
    return torch.log(texts / (1 + texts_with_V)).clamp(min=0)


def word_targets(has_BV: Tensor, weight_V: Tensor) -> Tensor:
    """Returns the target of the softmax over words [B V]: the weights of the words that a text has, which add up to 1. A
    text whose words all weigh nothing has them alike, one without words has none."""
    own_BV = has_BV * weight_V
    own_BV = torch.where(own_BV.sum(1, keepdim=True) > 0, own_BV, has_BV)
    return own_BV / own_BV.sum(1, keepdim=True).clamp(min=1e-12)


class SuperCLIP(Objective):
    """Document frequencies are counted once, when a run starts, in up to 1,000 texts from all over the data."""

    weight: Tensor
    special: Tensor

    def __init__(self, config: SuperCLIPConfig, model: ModelConfig):
        super().__init__()
        self.config, self.vocab = config, model.text.vocab
        self.words = nn.Linear(model.image.width, model.text.vocab)
        initialise(self, model.image.width)
        self.register_buffer("weight", torch.ones(model.text.vocab), persistent=False)
        special = torch.zeros(model.text.vocab, dtype=torch.bool)
        special[[model.text.pad, model.text.bos, model.text.eos, model.text.mask]] = True
        self.register_buffer("special", special, persistent=False)

    def check(self, samples: Iterator[Batch]) -> None:
        if not self.config.rare_words:
            return
        counted, texts = torch.zeros(self.vocab, device=self.weight.device), 0
        for batch in samples:
            counted += self.has(batch.to(self.weight.device)).sum(0)
            texts += len(batch)
        self.weight.copy_(inverse_frequencies(counted, max(1, texts)))

    def has(self, batch: Batch) -> Tensor:
        """1 where a text has a word, 0 elsewhere; special tokens are no words: [B V]."""
        position = torch.arange(batch.ids.shape[1], device=batch.ids.device)
        ids = torch.where(position < batch.length[:, None], batch.ids, batch.ids[:, :1])
        present = torch.zeros(len(ids), self.vocab, device=ids.device).scatter(1, ids, 1.0)
        return present.masked_fill(self.special, 0.0)

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        return {"words": self.has(batch).any(1).sum()}

    def forward(self, model: VLModel, image_BKD: Tensor, batch: Batch) -> dict[str, Loss]:
        has_BV = self.has(batch)
        logits_BV = at_least_fp32(self.words(image_BKD.mean(1)))
        loss_B = -(word_targets(has_BV, self.weight) * F.log_softmax(logits_BV, -1)).sum(1)
        return {"words": Loss(loss_B.sum(), has_BV.any(1).sum(), self.config.weight)}
