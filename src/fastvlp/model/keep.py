"""Encoding a part of the input: image patches and text positions that are kept (FLIP, arXiv 2212.00794, sections 3 and 4.1)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fastvlp.random import uniform

KEEP_SALT = 101
TEXT_SALT = 103

# random: any position, padding too, so that L has to be the same in every batch (FLIP: 32). prioritised: padding goes first.
TextPolicy = Literal["random", "prioritised"]


def keep_count(patches: int, share: float) -> int:
    """K: so many whole patches as fit into the share (FLIP's released code), at least one. 100 * 0.29 is 28.999... here."""
    return max(1, int(patches * share + 1e-6))


def random_keep(seed_B: Tensor, patches: int, share: float, salt: int = KEEP_SALT) -> Tensor:
    """Sorted indices [B K] of the patches that each row keeps, a function of the row's seed."""
    noise_BN = uniform(seed_B, (patches,), salt)
    return noise_BN.argsort(1)[:, : keep_count(patches, share)].sort(1).values


def keep_text(
    seed_B: Tensor, length_B: Tensor, L: int, keep: int, policy: TextPolicy, always_BL: Tensor | None = None
) -> Tensor:
    """Sorted indices [B K] of the text positions that are encoded, K = min(keep, L): the first (keep < length).sum() of them
    are words.

    always_BL: positions that stay whatever is drawn, at most `keep` in a row; by default the first and the last of the text,
        one of which is pooled. (The paper does not say how the position that FLIP pools survives.)
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
