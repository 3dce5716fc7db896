"""The common base of contrastive objectives of two towers: their options, and the embeddings of images and texts."""

from __future__ import annotations

import abc
from dataclasses import dataclass, replace

from torch import Tensor

from fastvlp.batch import Batch
from fastvlp.config import NotNegative
from fastvlp.errors import UserError
from fastvlp.model.frozen_states import TextUse
from fastvlp.model.keep import TextPolicy, keep_count, keep_text
from fastvlp.model.model import ModelConfig, VLModel
from fastvlp.objectives.equal_pairs import EqualPairs, contents
from fastvlp.objectives.objective import ObjectiveConfig


@dataclass(frozen=True, kw_only=True)
class PairsConfig(ObjectiveConfig, abc.ABC):
    """Options of contrastive objectives."""

    text_keep: float = 1.0
    """Share of the text positions that are encoded; in FLIP 1 is best (arXiv 2212.00794, section 4.1)."""
    text_policy: TextPolicy = "random"
    """Which positions are encoded: random draws them from all positions; prioritised drops padding first."""
    weight: NotNegative = 1.0
    """Weight of the loss, relative to the losses of other objectives."""
    equal_pairs: EqualPairs = "ignored"
    """Pairs with the same text or the same image: negatives uses them as negatives of each other, as published; ignored does
    not."""

    def __post_init__(self) -> None:
        if not 0 < self.text_keep <= 1:
            raise ValueError(f"`text_keep` is a share of the text, above 0 and up to 1, not {self.text_keep}")

    @property
    def text_use(self) -> TextUse:
        """The vectors of texts, or their words if only some of the words are encoded, for which no states are stored."""
        return "embedding" if self.text_keep == 1 else "words"

    def for_tuning(self) -> PairsConfig:
        """The objective with which a model that was trained by this one goes on on few pairs: alone, and on whole texts."""
        return replace(self, text_keep=1.0, weight=1.0)

    def check(self, model: ModelConfig) -> None:
        """Raises UserError if a share of the text is encoded whose length differs from batch to batch."""
        if self.text_keep < 1 and (model.embed is None or model.embed.text_length is None):
            raise UserError("`text_keep` needs texts of a fixed length; set `model.embed.text_length`, such as 32")


def pair_contents(batch: Batch, config: PairsConfig) -> tuple[Tensor, ...]:
    """Returns the hashes that a loss needs to leave out equal pairs: int64 [B 2], or nothing."""
    return (contents(batch),) if config.equal_pairs == "ignored" else ()


def embed_pair(
    model: VLModel, image_BKD: Tensor, batch: Batch, config: PairsConfig, *, drops_parts: bool = True
) -> tuple[Tensor, ...]:
    """Unit vectors of images and texts, two [B E]. Which positions of a text are encoded depends on its row's seed; without
    `drops_parts` all are."""
    keep_BK = None
    if drops_parts and config.text_keep < 1:
        ids, length = model.embed.words(batch.ids, batch.length, model.config.text)
        L = ids.shape[1]
        keep_BK = keep_text(batch.seed, length, L, keep_count(L, config.text_keep), config.text_policy)
    stored = batch.text if keep_BK is None else None
    text_BE = model.embed_text(batch.ids, batch.length, keep_BK, stored)
    return model.embed_image(image_BKD, batch.regions), text_BE
