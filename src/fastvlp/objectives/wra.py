"""Image-text matching on one stream, and word-region alignment over the same pass (UNITER, arXiv 1909.11740, section
3.2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree

from fastvlp.batch import Batch
from fastvlp.data.tokenize import Tokenizer
from fastvlp.errors import UserError
from fastvlp.model.model import ModelConfig, VLModel
from fastvlp.model.region_embedding import require_regions
from fastvlp.objectives.losses import at_least_fp32
from fastvlp.objectives.objective import MORE_ROWS, Loss, Objective, ObjectiveConfig
from fastvlp.objectives.transport import transport_distance
from fastvlp.random import uniform

COIN_SALT, SIDE_SALT, OTHER_SALT = 611, 612, 613


@dataclass(frozen=True, kw_only=True)
class WRAConfig(ObjectiveConfig):
    """rate: share of the pairs that are made wrong. negative: what of them is another's, the image (the released code),
    the text, or either by a coin (the paper). loss: `ce` of both logits, or `bce` of the second alone (the paper), which
    later is the retrieval score.

    align: weight of the transport distance, 0 leaves it out. sign: `code` draws right pairs together and pushes wrong
    ones apart; `paper` is the distance of the right pairs alone. special: <s> and </s> take part.
    """

    rate: float = 0.5
    negative: Literal["image", "text", "both"] = "image"
    loss: Literal["ce", "bce"] = "ce"
    align: float = 0.1
    sign: Literal["code", "paper"] = "code"
    special: bool = True
    beta: float = 0.5
    iterations: int = 50

    def __post_init__(self) -> None:
        if not 0 <= self.rate < 1:
            raise ValueError(f"rate is a share of wrong pairs, 0 or more and below 1, not {self.rate}")

    def build(self, model: ModelConfig, tokenizer: Tokenizer) -> WRA:
        return WRA(self)


class WRA(Objective):
    """The released code draws the other image from its whole data set, when an epoch begins. Here it comes from the
    batch, by the row's seed, so that nothing is read twice; a pair with the very same text is never the other one, nor is
    one that would make the row longer than the batch's longest: there a budget of tokens was counted before (bug U-7)."""

    abilities = frozenset({"match"})

    def __init__(self, config: WRAConfig):
        super().__init__()
        self.config = config

    def pairs(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """(text, image, right): the rows that each pair takes its two halves from, and whether they belong together. A pair
        that no other fits, such as the longest text's where all rows are as long, stays right."""
        c, B = self.config, len(batch)
        if B < 2 and self.training:
            raise UserError(
                f"image-text matching takes its negatives from the batch and this one has a single readable pair; "
                f"{MORE_ROWS}"
            )
        own = torch.arange(B, device=batch.ids.device)
        from_image = uniform(batch.seed, (1,), SIDE_SALT) < {"image": 1.0, "text": 0.0, "both": 0.5}[c.negative]
        length, count = batch.length, require_regions(batch.regions).count
        total_BB = torch.where(from_image, length[:, None] + count, length + count[:, None])
        fits = (batch.ids[:, None] != batch.ids).any(-1) & (total_BB <= (length + count).max())
        other = uniform(batch.seed, (B,), OTHER_SALT).masked_fill(~fits, 2.0).argmin(1)
        wrong = (uniform(batch.seed, (1,), COIN_SALT)[:, 0] < c.rate) & fits.any(1)
        image = wrong & from_image[:, 0]
        return torch.where(wrong & ~image, other, own), torch.where(image, other, own), ~wrong

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        count = batch.length.new_tensor(len(batch))
        aligned = self.pairs(batch)[2].sum() if self.config.sign == "paper" else count
        return {"match": count} | ({"align": aligned} if self.config.align else {})

    def forward(self, model: VLModel, image_BKD: Tensor, batch: Batch) -> dict[str, Loss]:
        c = self.config
        text, image, right = self.pairs(batch)
        ids, length = batch.ids[text], batch.length[text]
        regions = _pytree.tree_map_only(Tensor, lambda x: x[image], require_regions(batch.regions))
        joint = model.read_regions(image_BKD[image], regions, ids, length)
        logits, counts = at_least_fp32(model.single.match(joint.pooled)), self.counts(batch)
        losses = {"match": Loss(match_loss(logits, right, c.loss).sum(), counts["match"])}
        if c.align:
            position, ends = torch.arange(ids.shape[1], device=ids.device), int(not c.special)
            words = (position >= ends) & (position < length[:, None] - ends)
            distance = transport_distance(
                joint.text, joint.region, words, regions.mask, beta=c.beta, iterations=c.iterations
            )
            signed = torch.where(right, distance, 0 if c.sign == "paper" else -distance)
            losses["align"] = Loss(signed.sum(), counts["align"], c.align)
        return losses


def match_loss(logits_B2: Tensor, right_B: Tensor, loss: Literal["ce", "bce"]) -> Tensor:
    """Of logits (no match, match): [B]."""
    if loss == "ce":
        return F.cross_entropy(logits_B2, right_B.long(), reduction="none")
    return F.binary_cross_entropy_with_logits(logits_B2[:, 1], right_B.to(logits_B2.dtype), reduction="none")
