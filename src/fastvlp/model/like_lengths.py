"""Texts of a large batch, encoded in groups of about the same length: less padding, and the same states."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

# Rows of a group. Fewer make smaller matrix products, more of them more padding.
ROWS = 64


def worthwhile(ids_BL: Tensor) -> bool:
    """Whether groups save time: on a CPU, from two groups on. A GPU would have to wait for the lengths."""
    return ids_BL.device.type == "cpu" and len(ids_BL) >= 2 * ROWS


def in_groups(encode: Callable[[Tensor, Tensor], Tensor], ids_BL: Tensor, length_B: Tensor) -> Tensor:
    """States [B L D] of texts that do not see their padding, whose own states are zeros.

    Args:
        encode: ids [b l] and lengths [b] -> states [b l D].
    """
    L, order = ids_BL.shape[1], length_B.argsort()
    parts = []
    for rows in order.split(ROWS):
        longest = max(1, int(length_B[rows[-1]]))
        parts.append(F.pad(encode(ids_BL[rows, :longest], length_B[rows]), (0, 0, 0, L - longest)))
    return torch.cat(parts)[order.argsort()]
