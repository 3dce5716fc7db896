"""Reductions of the logits of contrastive losses in little memory.

A contrastive loss reduces each row of a logit matrix to one number, so the matrix need not be in memory at once: some rows
are computed and reduced at a time, and computed again in the backward pass. Inf-CL (arXiv 2410.17243) also cuts columns; here
a tile has whole rows, since E rows take no more memory than the keys themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastvlp.model.recompute import recomputing
from fastvlp.objectives.equal_pairs import are_equal
from fastvlp.objectives.losses import WHOLE_LOGITS

# The same for a CPU, whose cache holds a tile while it is normalised. On one core the softmax loss of 4096 pairs (E = 256)
# was 5 to 17 % faster in tiles than whole in three runs, that of 1024 and 2048 pairs up to a fifth slower.
WHOLE_LOGITS_CPU = 1 << 22

# The `contents` of rows [B 2] and of columns [M 2], or nothing is known of them.
Content = tuple[Tensor, Tensor] | tuple[None, None]
ANY_CONTENT: Content = (None, None)

Fold = Literal["logsumexp", "softplus"]


def _leave_out(
    x_RM: Tensor, value: float, without_RX: Tensor, row_R2: Tensor | None, column_M2: Tensor | None
) -> Tensor:
    """Writes `value` in the columns that are left out: those of `without_RX`, and those with the row's text or image."""
    x_RM.scatter_(1, without_RX, value)
    if row_R2 is not None and column_M2 is not None:
        x_RM.masked_fill_(are_equal(row_R2, column_M2), value)
    return x_RM


def _logits(
    query_RE: Tensor,
    key_ME: Tensor,
    bias: Tensor | None,
    without_RX: Tensor,
    row_R2: Tensor | None,
    column_M2: Tensor | None,
) -> Tensor:
    """The logits [R M]. Columns that are left out hold the lowest number: if all are left out, -inf would give NaN."""
    logits = query_RE @ key_ME.T
    if bias is not None:
        logits = logits.add_(bias)
    return _leave_out(logits, torch.finfo(logits.dtype).min, without_RX, row_R2, column_M2)


def _folded(logits_RM: Tensor, fold: Fold) -> Tensor:
    return F.softplus(logits_RM).sum(1) if fold == "softplus" else logits_RM.logsumexp(1)


class _Tiled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query_BE, key_ME, bias, without_BX, row_B2, column_M2, fold, rows):
        parts = zip(query_BE.split(rows), without_BX.split(rows), _split(row_B2, query_BE, rows))
        folded_B = torch.cat([_folded(_logits(q, key_ME, bias, out, row, column_M2), fold) for q, out, row in parts])
        ctx.save_for_backward(query_BE, key_ME, bias, row_B2, column_M2, without_BX, folded_B)
        ctx.fold, ctx.rows = fold, rows
        return folded_B

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads_B: Tensor):
        query_BE, key_ME, bias, row_B2, column_M2, *row_tensors = ctx.saved_tensors
        grad_query_BE = torch.empty_like(query_BE)
        grad_key_ME = torch.zeros_like(key_ME) if ctx.needs_input_grad[1] else None
        grad_bias = torch.zeros_like(bias) if ctx.needs_input_grad[2] else None
        parts = zip(
            *(x.split(ctx.rows) for x in (query_BE, *row_tensors, *grads_B, grad_query_BE)),
            _split(row_B2, query_BE, ctx.rows),
        )
        with torch.autocast(query_BE.device.type, enabled=False):
            for query, without, folded, grad, grad_query, row in parts:
                with recomputing():
                    logits = _logits(query, key_ME, bias, without, row, column_M2)
                share = logits.sigmoid_() if ctx.fold == "softplus" else logits.sub_(folded[:, None]).exp_()
                _leave_out(share.mul_(grad[:, None]), 0, without, row, column_M2)
                grad_query.copy_(share @ key_ME)
                if grad_key_ME is not None:
                    grad_key_ME.addmm_(share.T, query)
                if grad_bias is not None:
                    grad_bias += share.sum()
        return grad_query_BE, grad_key_ME, grad_bias, None, None, None, None, None


def _split(row_B2: Tensor | None, query_BE: Tensor, rows: int) -> Sequence[Tensor | None]:
    return [None] * len(query_BE.split(rows)) if row_B2 is None else row_B2.split(rows)


def fold_columns(
    fold: Fold,
    query_BE: Tensor,
    key_ME: Tensor,
    without_BX: Tensor | None = None,
    bias: Tensor | None = None,
    content: Content = ANY_CONTENT,
    *,
    whole_logits: int | None = None,
) -> Tensor:
    """log sum exp, or the sum of softplus, over the columns of `query @ key.T + bias` -> [B].

    Both operands have one type, fp32 or wider, in which all is computed, also under autocast. Up to `whole_logits` logits are
    kept for the backward pass, as autograd does. More are computed again there, in tiles of at most so many: a third more
    multiplications, memory in O(whole_logits + M), the same gradients.

    Args:
        without_BX: columns that row b leaves out, X of them for each row.
        bias: [] of the operands' type, or none.
        content: the `contents` of rows and columns, [B 2] and [M 2]; a row leaves out the columns with its text or its image.
        whole_logits: by default WHOLE_LOGITS, or WHOLE_LOGITS_CPU on a CPU.
    """
    if without_BX is None:
        without_BX = torch.empty(len(query_BE), 0, dtype=torch.long, device=query_BE.device)
    if whole_logits is None:
        whole_logits = WHOLE_LOGITS_CPU if query_BE.device.type == "cpu" else WHOLE_LOGITS
    rows = max(1, whole_logits // max(1, len(key_ME)))
    with torch.autocast(query_BE.device.type, enabled=False):
        if len(query_BE) <= rows:
            return _folded(_logits(query_BE, key_ME, bias, without_BX, *content), fold)
        return _Tiled.apply(query_BE, key_ME, bias, without_BX, *content, fold, rows)
