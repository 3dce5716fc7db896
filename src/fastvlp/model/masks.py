"""Who may see whom: functions of positions that return boolean masks, True = visible.

Rows are queries, columns are keys. `length` [B] counts real tokens, `<s>` (position 0) and `</s>` (position length - 1)
included. A row that would see nothing is given column 0, because softmax over nothing is undefined; such rows are padding
or are left out of the loss (`empty_rows`), so the choice is never seen.
Source: FLM (arXiv 2303.14038) Fig. 2 and sections 3.1-3.2.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _positions(length_B: Tensor, L: int) -> tuple[Tensor, Tensor, Tensor]:
    position = torch.arange(L, device=length_B.device)
    return position[:, None], position[None, :], length_B[:, None, None]


def _never_empty(visible: Tensor) -> Tensor:
    first = torch.zeros_like(visible)
    first[..., 0] = True
    return visible | (first & ~visible.any(-1, keepdim=True))


def full(length_B: Tensor, L: int) -> Tensor:
    """Every row sees every real token: [B 1 1 L]."""
    return (torch.arange(L, device=length_B.device) < length_B[:, None])[:, None, None]


def prefix(length_B: Tensor, prefix_B: Tensor, L: int) -> Tensor:
    """`<s>` and the `prefix` tokens after it see each other, later tokens see everything up to themselves: [B 1 L L]."""
    row, column, n = _positions(length_B, L)
    visible = (column <= torch.maximum(row, prefix_B[:, None, None])) & (column < n)
    return _never_empty(visible)[:, None]


def causal_official(length_B: Tensor, L: int) -> Tensor:
    """The released FLM's forward mask: `<s>` sees all and is seen by no other row; token i sees 1..i: [B 1 L L]."""
    row, column, n = _positions(length_B, L)
    chain = (column >= 1) & (column <= row) & (column < n)
    return (((row == 0) & (column < n)) | ((row > 0) & chain))[:, None]


def anticausal_official(length_B: Tensor, L: int) -> Tensor:
    """Its reverse mask: token i sees i..length-1; `<s>` and padding rows as in the forward mask: [B 1 L L]."""
    row, column, n = _positions(length_B, L)
    chain = (column >= row) & (column < n)
    visible = torch.where((row > 0) & (row < n), chain, causal_official(length_B, L)[:, 0])
    return visible[:, None]


def bridge(
    start_BQ: Tensor, end_BQ: Tensor, length_B: Tensor, forward_L: Tensor, reverse_BL: Tensor, *, first: int
) -> tuple[Tensor, Tensor]:
    """What the reconstructor's query of each row sees of the keys [forward stream | reverse stream].

    The query hidden by the span [start, end) sees forward states strictly left of it (from position `first`: 0 where
    `<s>` is text-blind, 1 where it has seen the text) and reverse states from `end` on (arXiv 2303.14038 section 3.2).

    forward_L, reverse_BL: the text position each column stands for; a reverse column of padding is -1.
    Returns (mask [B 1 Q 2L], empty [B Q]: rows without any visible key).
    """
    n = length_B[:, None, None]
    left = (forward_L >= first) & (forward_L < torch.clamp(start_BQ[..., None], min=1 - first)) & (forward_L < n)
    column = reverse_BL[:, None, :]
    right = (column >= end_BQ[..., None]) & (column < n)
    visible = torch.cat([left, right], -1)
    return _never_empty(visible)[:, None], ~visible.any(-1)


def bridge_all(length_B: Tensor, forward_L: Tensor, reverse_BL: Tensor) -> Tensor:
    """The summary query (row 0) sees every real state of both streams: [B 1 1 2L]."""
    n = length_B[:, None]
    return torch.cat([forward_L < n, (reverse_BL >= 0) & (reverse_BL < n)], -1)[:, None, None]
