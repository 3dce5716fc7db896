"""The cross-entropy of tokens under a vocabulary, in little memory."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvlp.model.fusion import LMHead
from fastvlp.model.recompute import recomputing

# With more logits than this (64 Mi numbers) the loss is computed chunk by chunk, and the logits are computed again in the
# backward pass: a third more multiplications, but never T x V numbers in memory.
WHOLE_LOGITS = 1 << 26
# Logits computed at once on the CPU: so many stay in its cache while they are normalised.
CACHED_LOGITS = 1 << 21
# In bf16 on the CPU the number of targets is rounded up to a multiple of this; that of FLM's queries on every device.
SAME_SHAPE = 64


def at_least_fp32(logits: Tensor) -> Tensor:
    """The same numbers in fp32; those in fp32 or fp64 as they are."""
    return logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits


class _KeptTokenLoss(torch.autograd.Function):
    """Keeps softmax minus one-hot, in the type of the products, and nothing else of size T x V for the backward pass."""

    @staticmethod
    def forward(ctx, hidden_TD, weight_VD, bias_V, target_T):
        share_TV = hidden_TD.new_empty(len(target_T), len(weight_VD))
        nll_T = torch.empty_like(at_least_fp32(hidden_TD[:, 0]))
        rows = max(1, CACHED_LOGITS // len(weight_VD))
        parts = zip(hidden_TD.split(rows), target_T[:, None].split(rows), share_TV.split(rows), nll_T.split(rows))
        for hidden, target, share, nll in parts:
            logits = at_least_fp32(F.linear(hidden, weight_VD, bias_V))
            top, correct = logits.amax(1, keepdim=True), logits.gather(1, target)
            total = logits.sub_(top).exp_().sum(1, keepdim=True)
            nll.copy_((total.log() + top - correct)[:, 0])
            logits.div_(total).scatter_add_(1, target, torch.full_like(correct, -1))
            share.copy_(logits)
        ctx.save_for_backward(hidden_TD, weight_VD, share_TV)
        return nll_T

    @staticmethod
    def backward(ctx, grad_T):
        hidden_TD, weight_VD, share_TV = ctx.saved_tensors
        grad = grad_T[:, None].to(hidden_TD.dtype)
        return (share_TV @ weight_VD) * grad, share_TV.T @ (hidden_TD * grad), (share_TV.T @ grad)[:, 0], None


class _ChunkedTokenLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_TD, weight_VD, bias_V, target_T, rows):
        kind = torch.float64 if hidden_TD.dtype == torch.float64 else torch.float32
        nll_T, normaliser_T = torch.empty(2, len(target_T), device=hidden_TD.device, dtype=kind).unbind()
        for part in torch.arange(len(target_T), device=hidden_TD.device).split(rows):
            logits = at_least_fp32(F.linear(hidden_TD[part], weight_VD, bias_V))
            normaliser_T[part] = logits.logsumexp(1)
            nll_T[part] = normaliser_T[part] - logits.gather(1, target_T[part, None])[:, 0]
        ctx.save_for_backward(hidden_TD, weight_VD, bias_V, target_T, normaliser_T)
        ctx.rows = rows
        return nll_T

    @staticmethod
    def backward(ctx, grad_T):
        hidden_TD, weight_VD, bias_V, target_T, normaliser_T = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden_TD)
        grad_weight = torch.zeros_like(weight_VD, dtype=torch.promote_types(weight_VD.dtype, torch.float32))
        grad_bias = torch.zeros_like(bias_V, dtype=torch.promote_types(weight_VD.dtype, torch.float32))
        for part in torch.arange(len(target_T), device=hidden_TD.device).split(ctx.rows):
            with recomputing():
                logits = at_least_fp32(F.linear(hidden_TD[part], weight_VD, bias_V))
            share = (logits - normaliser_T[part, None]).exp_()
            share[torch.arange(len(part), device=share.device), target_T[part]] -= 1
            share *= grad_T[part, None]
            grad_bias += share.sum(0)
            share = share.to(hidden_TD.dtype)
            grad_hidden[part] = share @ weight_VD
            grad_weight += share.T @ hidden_TD[part]
        return grad_hidden, grad_weight.to(weight_VD.dtype), grad_bias.to(bias_V.dtype), None, None


def places(*mask_BL: Tensor) -> list[Tensor]:
    """The numbers [T] of the positions that each mask marks, counted from row to row. Finding them waits for the device, since
    how many there are decides the size of what follows: so those of several masks are found at once."""
    place_T = torch.stack(mask_BL).flatten().nonzero()[:, 0]
    if len(mask_BL) == 1:
        return [place_T]
    parts = place_T.split(torch.stack([mask.sum() for mask in mask_BL]).tolist())
    return [part - i * mask_BL[0].numel() for i, part in enumerate(parts)]


def rows_at(x_BL: Tensor, place_T: Tensor) -> Tensor:
    """Selects the rows at these places of [B L ...] -> [T ...]."""
    return x_BL.flatten(0, 1).index_select(0, place_T)


def head_loss(head: LMHead, state_TD: Tensor, target_T: Tensor) -> Tensor:
    """Cross-entropy of each target under a vocabulary head -> [T]."""
    T = len(target_T)
    if state_TD.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
        # oneDNN compiles each product of a new shape, and most steps have a number of targets that none before had.
        more = -T % SAME_SHAPE
        state_TD, target_T = F.pad(state_TD, (0, 0, 0, more)), F.pad(target_T, (0, more))
    return token_loss(head.hidden(state_TD), head.vocabulary.weight, head.vocabulary.bias, target_T)[:T]


def token_loss(
    hidden_TD: Tensor, weight_VD: Tensor, bias_V: Tensor, target_T: Tensor, *, whole_logits: int = WHOLE_LOGITS
) -> Tensor:
    """Cross-entropy of each token under a linear vocabulary, in fp32 at least -> [T].

    Memory is O(whole_logits), not O(T V). Under autocast the matrix products run in its type, as those of nn.Linear do.
    """
    kind, rows = hidden_TD.device.type, max(1, whole_logits // weight_VD.shape[0])
    few = len(target_T) <= rows
    if few and (kind != "cpu" or not torch.is_grad_enabled()):
        return F.cross_entropy(at_least_fp32(F.linear(hidden_TD, weight_VD, bias_V)), target_T, reduction="none")
    if torch.is_autocast_enabled(kind):
        to = torch.get_autocast_dtype(kind)
        hidden_TD, weight_VD, bias_V = hidden_TD.to(to), weight_VD.to(to), bias_V.to(to)
    if few:
        return _KeptTokenLoss.apply(hidden_TD, weight_VD, bias_V, target_T)
    return _ChunkedTokenLoss.apply(hidden_TD, weight_VD, bias_V, target_T, rows)
