"""Attention masks: boolean functions of positions, True where a row (a query) sees a column (a key).

`length` [B] counts real tokens, `<s>` (position 0) and `</s>` (position length - 1) included. A row that would see nothing
sees column 0 instead, because softmax over nothing is undefined. Such rows are padding or are left out of the loss, so that
the choice has no effect. Source: FLM (arXiv 2303.14038), Fig. 2 and sections 3.1-3.2.
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
    """[B 1 1 L]: every row sees every real token."""
    return (torch.arange(L, device=length_B.device) < length_B[:, None])[:, None, None]


def prefix(length_B: Tensor, prefix_B: Tensor, L: int) -> Tensor:
    """[B 1 L L]: `<s>` and the `prefix` tokens after it see each other; later tokens see everything up to themselves."""
    row, column, n = _positions(length_B, L)
    visible = (column <= torch.maximum(row, prefix_B[:, None, None])) & (column < n)
    return _never_empty(visible)[:, None]


def causal_official(length_B: Tensor, L: int) -> Tensor:
    """[B 1 L L], the released FLM's forward mask: `<s>` sees all and is seen by no other row; token i sees 1..i."""
    row, column, n = _positions(length_B, L)
    chain = (column >= 1) & (column <= row) & (column < n)
    return (((row == 0) & (column < n)) | ((row > 0) & chain))[:, None]


def anticausal_official(length_B: Tensor, L: int) -> Tensor:
    """[B 1 L L], its reverse mask: token i sees i..length-1; `<s>` and padding rows as in the forward mask."""
    row, column, n = _positions(length_B, L)
    chain = (column >= row) & (column < n)
    visible = torch.where((row > 0) & (row < n), chain, causal_official(length_B, L)[:, 0])
    return visible[:, None]


def bridge(
    start_BQ: Tensor, end_BQ: Tensor, length_B: Tensor, forward_L: Tensor, reverse_BL: Tensor, *, first: int
) -> tuple[Tensor, Tensor]:
    """Returns the mask of the reconstructor's queries over the keys [forward stream | reverse stream].

    A query that is hidden by the span [start, end) sees forward states left of it, from position `first` on (0 where `<s>` sees
    no text, 1 where it has seen the text), and reverse states from `end` on (arXiv 2303.14038, section 3.2).

    forward_L, reverse_BL: the text position of each column; -1 for padding.
    Returns (mask [B 1 Q 2L], empty [B Q]: rows without any visible key).
    """
    n = length_B[:, None, None]
    left = (forward_L >= first) & (forward_L < torch.clamp(start_BQ[..., None], min=1 - first)) & (forward_L < n)
    column = reverse_BL[:, None, :]
    right = (column >= end_BQ[..., None]) & (column < n)
    visible = torch.cat([left, right], -1)
    if first == 0:
        # Every query sees `<s>`.
        return visible[:, None], torch.zeros_like(start_BQ, dtype=torch.bool)
    return _never_empty(visible)[:, None], ~visible.any(-1)


def bridge_all(length_B: Tensor, forward_L: Tensor, reverse_BL: Tensor) -> Tensor:
    """[B 1 1 2L]: the query of the summary sees every real state of both streams."""
    n = length_B[:, None]
    return torch.cat([forward_L < n, (reverse_BL >= 0) & (reverse_BL < n)], -1)[:, None, None]
