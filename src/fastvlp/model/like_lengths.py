"""Texts of a large batch, encoded in groups of about the same length: less padding, and the same states."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

# Rows of a group. Fewer make smaller matrix products, more of them more padding.
ROWS, GPU_ROWS = 64, 256


def rows_of_group(ids_BL: Tensor) -> int:
    return ROWS if ids_BL.device.type == "cpu" else GPU_ROWS


def worthwhile(ids_BL: Tensor, anywhere: bool) -> bool:
    """Whether groups save work: from two groups on, on a CPU or `anywhere`. A GPU has to wait for their lengths, and runs each
    layer once for each group. A graph that is exported is for any number of rows, and has no groups."""
    if torch.compiler.is_exporting():
        return False
    return (anywhere or ids_BL.device.type == "cpu") and len(ids_BL) >= 2 * rows_of_group(ids_BL)


def in_groups(encode: Callable[[Tensor, Tensor], Tensor], ids_BL: Tensor, length_B: Tensor) -> Tensor:
    """States [B L D] of texts that do not see their padding, whose own states are zeros.

    Args:
        encode: ids [b l] and lengths [b] -> states [b l D].
    """
    L, (sorted_B, order) = ids_BL.shape[1], length_B.sort()
    groups = order.split(rows_of_group(ids_BL))
    # Read at once: a GPU is waited for a single time.
    longest = torch.stack([part[-1] for part in sorted_B.split(len(groups[0]))]).clamp(min=1).tolist()
    parts = []
    for rows, most in zip(groups, longest):
        parts.append(F.pad(encode(ids_BL[rows, :most], length_B[rows]), (0, 0, 0, L - most)))
    return torch.cat(parts)[order.argsort()]
