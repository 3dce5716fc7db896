"""Image-text matching in a single stream, with word-region alignment in the same pass (UNITER, arXiv 1909.11740, section
3.2)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree

from fastvlp.batch import Batch, Regions
from fastvlp.config import Count, NotNegative, Positive
from fastvlp.data.tokenize import Tokenizer
from fastvlp.errors import UserError
from fastvlp.model.model import ModelConfig, VLModel
from fastvlp.model.region_embedding import require_regions
from fastvlp.objectives.equal_pairs import EqualPairs, wrong_pairs
from fastvlp.objectives.losses import at_least_fp32
from fastvlp.objectives.objective import MORE_ROWS, Loss, Objective, ObjectiveConfig, constant
from fastvlp.objectives.transport import transport_distance
from fastvlp.random import mix64, uniform

COIN_SALT, SIDE_SALT, OTHER_SALT, ORDER_SALT = 611, 612, 613, 620
# Rounds in which rows are divided into twos: more than one, since two neighbours may have the same text or image.
ROUNDS = 6


@dataclass(frozen=True, kw_only=True)
class WRAConfig(ObjectiveConfig):
    """Decide whether a text belongs to an image's regions, and align its words with them by optimal transport."""

    rate: float = 0.5
    """Share of the pairs that get the image or text of another pair."""
    negative: Literal["image", "text", "both"] = "image"
    """Part of a wrong pair that is from another pair: the image (the released code), the text, or one of both with equal chance
    (the paper)."""
    loss: Literal["ce", "bce"] = "ce"
    """Matching loss: ce is the cross-entropy over both logits; bce uses only the second logit (the paper), which is later the
    retrieval score."""
    align: NotNegative = 0.1
    """Weight of the transport distance; 0 leaves it out."""
    sign: Literal["code", "paper"] = "code"
    """Distances in the loss: code adds those of right pairs and subtracts those of wrong pairs; paper uses only those of right
    pairs."""
    special: bool = True
    """Whether <s> and </s> are aligned too."""
    beta: Positive = 0.5
    """Strength of the entropy term in the transport problem (IPOT)."""
    iterations: Count = 50
    """Number of iterations that solve the transport problem."""
    equal_pairs: EqualPairs = "ignored"
    """Pairs with the same text or the same image: negatives uses them as negatives of each other, ignored does not."""

    def __post_init__(self) -> None:
        if not 0 <= self.rate < 1:
            raise ValueError(f"`rate` is a share of wrong pairs, 0 or more and below 1, not {self.rate}")

    def build(self, model: ModelConfig, tokenizer: Tokenizer) -> WRA:
        return WRA(self)


class WRA(Objective):
    """Matching, and alignment where it has a weight.

    The released code draws the other image from its whole data set when an epoch begins. Here it comes from the batch, by the
    rows' seeds, so that nothing is read twice. Two pairs with nearly as many regions exchange their images (or texts): wrong
    pairs then have as many words and regions as right ones, and a model cannot tell them apart by these numbers. Two with the
    same text or image exchange nothing.
    """

    abilities = frozenset({"match"})
    contrasts = True

    def __init__(self, config: WRAConfig):
        super().__init__()
        self.config = config

    def pairs(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """(text, image, right): the rows from which each pair takes its two halves, and whether they belong together. A pair
        that finds no other stays right."""
        c, B = self.config, len(batch)
        if B < 2 and self.training:
            raise UserError(
                f"image-text matching takes its negatives from the batch, and this one has a single readable pair; "
                f"{MORE_ROWS}"
            )
        own = torch.arange(B, device=batch.ids.device)
        other = random_twos(require_regions(batch.regions).count, batch.seed, wrong_pairs(batch, c.equal_pairs))
        # The sum is the same for both of two rows.
        mixed = mix64(batch.seed)
        both = mixed + mixed[other]
        wrong = (uniform(both, (), COIN_SALT) < c.rate) & (other != own)
        from_image = uniform(both, (), SIDE_SALT) < {"image": 1.0, "text": 0.0, "both": 0.5}[c.negative]
        return torch.where(wrong & ~from_image, other, own), torch.where(wrong & from_image, other, own), ~wrong

    def regions(self, batch: Batch, text: Tensor, image: Tensor) -> Regions:
        """The regions of the rows `image`, beside the texts of the rows `text`. No row may become longer than the longest of
        the batch, whose size was chosen by a budget of tokens: the last regions, the least certain ones, are left out."""
        regions = require_regions(batch.regions)
        most_B = (batch.length + regions.count).max() - batch.length[text]
        regions = _pytree.tree_map_only(Tensor, lambda x: x[image], regions)
        return replace(regions, count=regions.count.minimum(most_B))

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        count = constant(len(batch), batch.length)
        aligned = self.pairs(batch)[2].sum() if self.config.sign == "paper" else count
        return {"match": count} | ({"align": aligned} if self.config.align else {})

    def forward(self, model: VLModel, image_BKD: Tensor, batch: Batch) -> dict[str, Loss]:
        c = self.config
        text, image, right = self.pairs(batch)
        ids, length = batch.ids[text], batch.length[text]
        regions = self.regions(batch, text, image)
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


def random_twos(count_B: Tensor, seed_B: Tensor, wrong_BB: Tensor) -> Tensor:
    """Divides rows at random into twos with nearly the same count -> the other row of each [B].

    A row that is left over gets one with the nearest count, of which it is not the other; itself, if there is none.

    Args:
        wrong_BB: which two rows may be together, symmetric.
    """
    own = torch.arange(len(count_B), device=count_B.device)
    other = own
    for k in range(ROUNDS):
        free = other == own
        # Rows with a count follow each other in random order. Every second time the first of them is left out.
        key = torch.where(free, count_B + uniform(seed_B, (), ORDER_SALT + k), torch.inf)
        order = key.argsort()[k % 2 :]
        half = len(order) // 2
        a, b = order[: 2 * half].view(half, 2).unbind(1)
        fits = free[a] & free[b] & wrong_BB[a, b]
        other = other.scatter(0, a, torch.where(fits, b, other[a]))
        other = other.scatter(0, b, torch.where(fits, a, other[b]))
    gap_BB = (count_B[:, None] - count_B).abs() + uniform(seed_B, (len(own),), OTHER_SALT)
    nearest = gap_BB.masked_fill(~wrong_BB, torch.inf).argmin(1)
    return torch.where((other == own) & wrong_BB.any(1), nearest, other)


def match_loss(logits_B2: Tensor, right_B: Tensor, loss: Literal["ce", "bce"]) -> Tensor:
    """The loss of logits (no match, match): [B]."""
    if loss == "ce":
        return F.cross_entropy(logits_B2, right_B.long(), reduction="none")
    return F.binary_cross_entropy_with_logits(logits_B2[:, 1], right_B.to(logits_B2.dtype), reduction="none")
