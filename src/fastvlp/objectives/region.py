"""Masked region modeling: hidden regions are predicted from the words and the other regions (UNITER, arXiv 1909.11740, section
3.2).

By default masking is conditional: no word is hidden while regions are. `word_rate` hides words too (the ablation in Table 2,
row 12), and `MLMConfig.region_rate` hides regions while words are predicted.
"""

from __future__ import annotations

import abc
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvlp.batch import Batch
from fastvlp.config import Count
from fastvlp.data.tokenize import Tokenizer
from fastvlp.errors import UserError
from fastvlp.model.layers import initialise
from fastvlp.model.model import ModelConfig, VLModel
from fastvlp.model.region_embedding import random_hide, require_regions
from fastvlp.model.single_stream import SingleConfig
from fastvlp.objectives.losses import at_least_fp32, places, rows_at
from fastvlp.objectives.mlm import MLMConfig
from fastvlp.objectives.objective import Loss, Objective, ObjectiveConfig


@dataclass(frozen=True, kw_only=True)
class MaskedRegionsConfig(ObjectiveConfig, abc.ABC):
    """Options of the two objectives that predict hidden regions."""

    rate: float = 0.15
    """Share of the regions that are hidden; at least one region of each image."""
    word_rate: float = 0.0
    """Share of the words that are hidden at the same time."""

    def __post_init__(self) -> None:
        if not 0 < self.rate <= 1 or not 0 <= self.word_rate <= 1:
            raise ValueError(
                f"`rate` is a share above 0, `word_rate` one of 0 or more, not {self.rate}, {self.word_rate}"
            )


@dataclass(frozen=True, kw_only=True)
class MRFRConfig(MaskedRegionsConfig):
    """Predict the feature of each hidden region."""

    reduction: Literal["mean", "sum"] = "mean"
    """How the squared differences are reduced over the dimensions of a feature: mean, as in the released code, or sum, which is
    the paper's squared L2 distance."""

    def build(self, model: ModelConfig, tokenizer: Tokenizer) -> MRFR:
        return MRFR(self, model, tokenizer)


@dataclass(frozen=True, kw_only=True)
class MRCConfig(MaskedRegionsConfig):
    """Predict the detector's class of each hidden region."""

    classes: Count = 1601
    """Number of classes of the detector."""
    background: bool = True
    """Whether the first class is the background."""
    target: Literal["soft", "hard"] = "soft"
    """Target: soft uses the detector's probabilities of all classes (MRC-kl), and hard the most probable class that is not
    background."""
    reduction: Literal["mean", "batchmean"] = "mean"
    """With soft targets, how the divergence is reduced over the classes: mean, as in the released code, or batchmean, which
    gives the divergence itself."""

    def build(self, model: ModelConfig, tokenizer: Tokenizer) -> MRC:
        return MRC(self, model, tokenizer)


def feature_error(predicted_TF: Tensor, target_TF: Tensor, reduction: Literal["mean", "sum"]) -> Tensor:
    """Squared error of each region: [T]."""
    square = (predicted_TF - target_TF).square()
    return square.mean(1) if reduction == "mean" else square.sum(1)


def class_nll(logits_TC: Tensor, share_TC: Tensor, *, background: bool = True) -> Tensor:
    """Cross-entropy of each region's best class, which is not the background in column 0: [T]."""
    first = int(background)
    return F.cross_entropy(logits_TC, share_TC[:, first:].argmax(1) + first, reduction="none")


def class_divergence(logits_TC: Tensor, share_TC: Tensor, reduction: Literal["mean", "batchmean"]) -> Tensor:
    """KL(shares || predicted) of each region, all classes included: [T]."""
    each = F.kl_div(logits_TC.log_softmax(1), share_TC, reduction="none")
    return each.mean(1) if reduction == "mean" else each.sum(1)


def single_config(model: ModelConfig) -> SingleConfig:
    if model.single is None:
        raise UserError(
            "the objective reads words and regions in one stream; set `model.single`, as sizes.uniter_base does"
        )
    return model.single


class MaskedRegions(Objective, abc.ABC):
    """The common base of both objectives: draws the hidden regions, and computes their states."""

    def __init__(self, config: MaskedRegionsConfig, model: ModelConfig, tokenizer: Tokenizer):
        super().__init__()
        layer = single_config(model).layer
        self.rate = config.rate
        words = MLMConfig(mask_rate=config.word_rate, whole_word=False) if config.word_rate else None
        self.words = words.build(model, tokenizer) if words else None
        self.transform = nn.Sequential(
            nn.Linear(layer.width, layer.width), nn.GELU(), nn.LayerNorm(layer.width, eps=layer.eps)
        )
        initialise(self, layer.width)

    def candidates(self, batch: Batch) -> Tensor:
        """Returns the regions that may be hidden: bool [B R]."""
        return require_regions(batch.regions).mask

    def hidden(self, batch: Batch) -> Tensor:
        """Draws the regions that are hidden and predicted: bool [B R]."""
        return random_hide(batch.seed, self.candidates(batch), self.rate)

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        return {"masked": self.hidden(batch).sum()}

    def forward(self, model: VLModel, image_BKD: Tensor, batch: Batch) -> dict[str, Loss]:
        hidden = self.hidden(batch)
        ids = self.words.corrupt(batch, self.words.draw(batch)[0]) if self.words else batch.ids
        joint = model.read_regions(image_BKD, batch.regions, ids, batch.length, hidden_BR=hidden)
        (place_T,) = places(hidden)
        state_TD = self.transform(rows_at(joint.region, place_T))
        error = self.error(model, state_TD, rows_at(image_BKD, place_T), batch, place_T)
        return {"masked": Loss(error.sum(), hidden.sum())}

    @abc.abstractmethod
    def error(self, model: VLModel, state_TD: Tensor, feature_TF: Tensor, batch: Batch, place_T: Tensor) -> Tensor:
        """The loss of each hidden region, row by row: [T]. `place_T`: where they are among all regions."""


class MRFR(MaskedRegions):
    """Masked region feature regression: the feature is predicted through the transpose of the projection that reads it."""

    def __init__(self, config: MRFRConfig, model: ModelConfig, tokenizer: Tokenizer):
        super().__init__(config, model, tokenizer)
        self.config = config
        self.bias = nn.Parameter(torch.zeros(single_config(model).regions.width))

    def error(self, model: VLModel, state_TD: Tensor, feature_TF: Tensor, batch: Batch, place_T: Tensor) -> Tensor:
        predicted = F.linear(state_TD, model.single.regions.feature.weight.T, self.bias)
        # The target gets no gradient: an image encoder that makes it would learn to make all regions alike.
        return feature_error(at_least_fp32(predicted), at_least_fp32(feature_TF.detach()), self.config.reduction)


class MRC(MaskedRegions):
    """Masked region classification: the detector's classes. Regions without classes are not predicted."""

    def __init__(self, config: MRCConfig, model: ModelConfig, tokenizer: Tokenizer):
        super().__init__(config, model, tokenizer)
        self.config = config
        width = single_config(model).layer.width
        self.classify = nn.Linear(width, config.classes)
        initialise(self.classify, width)

    def check(self, samples: Iterator[Batch]) -> None:
        """Raises UserError if no sample has any class."""
        classified = (bool(self.candidates(batch).any()) for batch in samples)
        if not next(classified, True) and not any(classified):
            raise self._wrong_classes("none")

    def _shares(self, batch: Batch) -> Tensor:
        """Shares of the classes [B R C]; zeros where no region of the batch has any."""
        regions, classes = require_regions(batch.regions), self.config.classes
        if regions.classes is None:
            return regions.box.new_zeros(*regions.box.shape[:2], classes)
        if regions.classes.shape[2] != classes:
            raise self._wrong_classes(regions.classes.shape[2])
        return regions.classes

    def _wrong_classes(self, present: int | str) -> UserError:
        return UserError(
            f"MRC predicts {self.config.classes} classes of regions, and the data has {present}: `data.regions.classes` names "
            f"them, or a detector's regions hold them as soft_labels, and the objective's `classes` is their number"
        )

    def candidates(self, batch: Batch) -> Tensor:
        return require_regions(batch.regions).mask & (self._shares(batch).sum(-1) > 0)

    def error(self, model: VLModel, state_TD: Tensor, feature_TF: Tensor, batch: Batch, place_T: Tensor) -> Tensor:
        logits, shares = at_least_fp32(self.classify(state_TD)), at_least_fp32(rows_at(self._shares(batch), place_T))
        if self.config.target == "hard":
            return class_nll(logits, shares, background=self.config.background)
        return class_divergence(logits, shares, self.config.reduction)
