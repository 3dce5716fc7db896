"""Optimal transport between the words of a text and the regions of an image: how well the two fit.

It is solved by IPOT, the proximal point method (Xie et al., arXiv 1802.04307), as in UNITER (arXiv 1909.11740, section 3.2;
released code: model/ot.py), always in fp32 at least: the plan is a product of 50 matrices of exponentials.
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
    """The approximately cheapest way to move equal masses on the words to equal masses on the regions [B L R].

    The plan of a row sums to 1, or to 0 if it has no word or no region. Each iteration solves the problem with an entropy
    term around the last plan, by one scaling of the regions and one of the words.

    Args:
        cost_BLR: cost of moving a unit of mass from a word to a region.
        pair_BLR: which words and regions take part, a rectangle in each row.
        beta: strength of the entropy term.
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
    """The cost of the plan [B]. `word_BL` and `region_BR` say which states take part.

    The gradient flows through the cost, and the plan counts as a constant; at the optimum that is exact (envelope theorem).
    """
    pair = word_BL[:, :, None] & region_BR[:, None]
    cost = cosine_cost(word_BLD, region_BRD)
    return (cost * transport_plan(cost, pair, beta=beta, iterations=iterations)).sum((1, 2))
