"""How well the words of a text and the regions of a picture fit, as optimal transport between the two sets of states.

IPOT, the proximal point method (Xie et al., arXiv 1802.04307), as UNITER uses it (arXiv 1909.11740, section 3.2; released
code: model/ot.py). Always in fp32 at least: the plan is a product of 50 matrices of exponentials.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvlp.objectives.losses import at_least_fp32


def cosine_cost(word_BLD: Tensor, region_BRD: Tensor) -> Tensor:
    """1 - cosine of each word with each region: [B L R]."""
    with torch.autocast(word_BLD.device.type, enabled=False):
        word, region = (F.normalize(at_least_fp32(x), dim=-1, eps=1e-5) for x in (word_BLD, region_BRD))
        return 1 - word @ region.transpose(1, 2)


@torch.no_grad()
def transport_plan(cost_BLR: Tensor, pair_BLR: Tensor, *, beta: float = 0.5, iterations: int = 50) -> Tensor:
    """The cheapest way to move equal masses on the words to equal masses on the regions, approximately: [B L R], summing
    to 1 a row of the batch, to 0 where it has no pair.

    pair: which words and regions are real, as a rectangle of each row. A step solves the problem with an entropy term
    around the last plan, by one scaling of the regions and one of the words.
    """
    with torch.autocast(cost_BLR.device.type, enabled=False):
        word_BL1, region_B1R = pair_BLR.any(2, keepdim=True), pair_BLR.any(1, keepdim=True)
        words, regions = word_BL1.sum(1, keepdim=True), region_B1R.sum(2, keepdim=True)
        kernel = torch.exp(-cost_BLR / beta).masked_fill(~pair_BLR, 0)
        plan = pair_BLR.to(kernel.dtype)
        by_word = word_BL1 / words.clamp(min=1)
        for _ in range(iterations):
            step = kernel * plan
            by_region = torch.where(region_B1R, 1 / (regions * (step * by_word).sum(1, keepdim=True)), 0)
            by_word = torch.where(word_BL1, 1 / (words * (step * by_region).sum(2, keepdim=True)), 0)
            plan = by_word * step * by_region
        return plan


def transport_distance(
    word_BLD: Tensor,
    region_BRD: Tensor,
    word_BL: Tensor,
    region_BR: Tensor,
    *,
    beta: float = 0.5,
    iterations: int = 50,
) -> Tensor:
    """Cost of the plan, [B], where `word_BL` and `region_BR` say which states take part. The plan is a constant to the
    gradient, which flows through the cost (the envelope theorem makes that exact at the optimum)."""
    pair = word_BL[:, :, None] & region_BR[:, None]
    cost = cosine_cost(word_BLD, region_BRD)
    return (cost * transport_plan(cost, pair, beta=beta, iterations=iterations)).sum((1, 2))
