"""Text masking: a text tower that encodes some of the positions (FLIP, arXiv 2212.00794, section 4.1, Table 1c)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fastvlp.random import uniform

TEXT_SALT = 103

# random: any position, padding too, so that L has to be the same in every batch (FLIP: 32). prioritised: padding goes first.
TextPolicy = Literal["random", "prioritised"]


def keep_text(
    seed_B: Tensor, length_B: Tensor, L: int, keep: int, policy: TextPolicy, always_BL: Tensor | None = None
) -> Tensor:
    """Positions that are encoded -> [B K], sorted, K = min(keep, L): the first (keep < length).sum() are words.

    always_BL: positions that stay whatever is drawn, at most `keep` a row; without it the first and the last of the text,
        one of which is pooled. (How FLIP's own pooled position survives is told nowhere.)
    """
    if keep < 1 or policy not in ("random", "prioritised"):
        raise ValueError(f"keep {keep}, policy {policy!r}: keep at least 1; policies are random and prioritised")
    position, last_B1 = torch.arange(L, device=seed_B.device), length_B[:, None] - 1
    if always_BL is None:
        always_BL = (position == 0) | (position == last_B1)
    rank_BL = uniform(seed_B, (L,), TEXT_SALT) - 2.0 * always_BL
    if policy == "prioritised":
        rank_BL = rank_BL + 1.0 * (position > last_B1)
    return rank_BL.argsort(dim=1, stable=True)[:, :keep].sort(1).values
