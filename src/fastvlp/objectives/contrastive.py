"""Contrastive losses of unit vectors, as plain functions: one number for each row.

Rows are what this rank embedded. Columns are the candidates, of this rank or of all; `target_B` is the column of each row's
own. `scale` [] is the inverse temperature, which may get a gradient. Everything is computed in fp32 at least, also from bf16
vectors and under autocast. Logits that are too many to keep are computed again in the backward pass (`tiled.fold_columns`
explains `whole_logits`): all gradients stay exact. Columns with a row's text or image are none of its negatives where
`content` is given, the `contents` (`equal_pairs.py`) of rows [B 2] and columns [M 2].

A softmax loss is written as softplus(log sum exp of the negatives - positive). Late in training the positive is mostly far
larger; a softmax over all candidates would round away the digits of loss and gradient that this form keeps.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvlp.objectives.equal_pairs import are_equal
from fastvlp.objectives.losses import at_least_fp32
from fastvlp.objectives.tiled import ANY_CONTENT, Content, fold_columns


def clipped_scale(log_scale: Tensor, most: float = 100.0) -> Tensor:
    """exp of the parameter, clipped to 1 to `most`, with gradient zero beyond the bounds, so that it stays there (FLIP, arXiv
    2212.00794)."""
    return log_scale.clamp(0, math.log(most)).exp()


@torch.no_grad()
def clamp_log_scale(log_scale: Tensor, most: float = 100.0) -> None:
    """Sets the parameter back to the bounds, 1 to `most`, after a step; later steps may lower it again (CLIP, open_clip)."""
    log_scale.clamp_(0, math.log(most))


def info_nce(
    query_BE: Tensor,
    key_ME: Tensor,
    target_B: Tensor,
    scale: Tensor,
    *,
    content: Content = ANY_CONTENT,
    whole_logits: int | None = None,
) -> Tensor:
    """Cross-entropy of each row over all columns -> [B] (CLIP, arXiv 2103.00020, figure 3: the mean of both directions)."""
    query_BE, key_ME = at_least_fp32(query_BE) * scale, at_least_fp32(key_ME)
    positive_B = (query_BE * key_ME[target_B]).sum(1)
    negatives_B = fold_columns(
        "logsumexp", query_BE, key_ME, target_B[:, None], content=content, whole_logits=whole_logits
    )
    return F.softplus(negatives_B - positive_B)


def sigmoid_loss(
    image_BE: Tensor,
    text_ME: Tensor,
    target_B: Tensor,
    scale: Tensor,
    bias: Tensor,
    *,
    content: Content = ANY_CONTENT,
    whole_logits: int | None = None,
) -> Tensor:
    """A binary decision for each image and text, summed over the texts -> [B] (SigLIP, arXiv 2303.15343, algorithm 1)."""
    image_BE, text_ME = at_least_fp32(image_BE) * scale, at_least_fp32(text_ME)
    bias = bias.to(image_BE.dtype)
    positive_B = (image_BE * text_ME[target_B]).sum(1) + bias
    negatives_B = fold_columns(
        "softplus", image_BE, text_ME, target_B[:, None], bias, content=content, whole_logits=whole_logits
    )
    return F.softplus(-positive_B) + negatives_B


def queue_nce(
    query_BE: Tensor,
    key_ME: Tensor,
    queue_KE: Tensor,
    target_B: Tensor,
    scale: Tensor,
    mode: Literal["pos+queue", "batch+queue"],
    momentum_BE: Tensor | None = None,
    alpha: float = 0.4,
    *,
    content: Content = ANY_CONTENT,
    queue_content_K2: Tensor | None = None,
    whole_logits: int | None = None,
) -> Tensor:
    """Cross-entropy of each row over momentum keys and the keys of earlier steps, which get no gradients -> [B].

    Args:
        queue_KE: keys of earlier steps; there may be none.
        mode: the candidates are a row's own key and the queue (BriVL 1.0, arXiv 2103.06561), or all keys and the queue
            (ALBEF, arXiv 2107.07651, section 3.2; BriVL 2).
        momentum_BE: only with "batch+queue": embeddings of the rows' own inputs by the momentum encoder. With weight `alpha`
            a row's target is then the softmax of their similarities to the candidates (ALBEF, section 3.4).
        queue_content_K2: with `content`, the same of the queue.
    """
    query_BE = at_least_fp32(query_BE) * scale
    key_ME, queue_KE = at_least_fp32(key_ME.detach()), at_least_fp32(queue_KE.detach())
    own_BE = key_ME[target_B]
    (content_B2, content_M2), own_B1 = content, target_B[:, None]
    older: Content = ANY_CONTENT
    if content_B2 is not None and queue_content_K2 is not None:
        older = content_B2, queue_content_K2
    negatives_B = fold_columns("logsumexp", query_BE, queue_KE, content=older, whole_logits=whole_logits)
    if mode == "batch+queue":
        others_B = fold_columns("logsumexp", query_BE, key_ME, own_B1, content=content, whole_logits=whole_logits)
        negatives_B = torch.logaddexp(negatives_B, others_B)
    hard_B = F.softplus(negatives_B - (query_BE * own_BE).sum(1))
    if momentum_BE is None:
        return hard_B
    if mode != "batch+queue":
        raise ValueError('soft targets need candidates that all rows have in common: mode "batch+queue"')
    # Logits are linear in the keys, so a soft target is the mean key under its shares, and that mean is an attention.
    without_BM = None
    if content_B2 is not None and content_M2 is not None and queue_content_K2 is not None:
        without_BM = are_equal(content_B2, torch.cat([content_M2, queue_content_K2])).scatter_(1, own_B1, False)
    soft_BE = attended(at_least_fp32(momentum_BE) * scale, torch.cat([key_ME, queue_KE]), without_BM)
    return hard_B + alpha * (query_BE * (own_BE - soft_BE)).sum(1)


@torch.no_grad()
def attended(query_BE: Tensor, key_ME: Tensor, without_BM: Tensor | None = None) -> Tensor:
    """softmax(query @ key.T) @ key -> [B E], without gradients, in the type of the operands also under autocast. Each row
    leaves out the keys in `without_BM`."""
    query, key = query_BE[None, None], key_ME[None, None]
    # The kernel for a mask rounds otherwise and needs more memory, so that it is used where there is something to leave out.
    mask = None if without_BM is None or not without_BM.any() else ~without_BM
    with torch.autocast(query.device.type, enabled=False):
        return F.scaled_dot_product_attention(query, key, key, attn_mask=mask, scale=1.0)[0, 0]


def nt_xent(
    a_BE: Tensor,
    b_BE: Tensor,
    all_a_ME: Tensor,
    all_b_ME: Tensor,
    target_B: Tensor,
    scale: Tensor,
    *,
    whole_logits: int | None = None,
) -> Tensor:
    """Cross-entropy of each view with the other view of its image, among all 2M views but itself -> [2B], the rows of `a`,
    then of `b` (SimCLR, arXiv 2002.05709, equation 1). Row b of both views is column target_B of `all_a` and `all_b`."""
    query_BE = at_least_fp32(torch.cat([a_BE, b_BE])) * scale
    key_ME = at_least_fp32(torch.cat([all_a_ME, all_b_ME]))
    M = len(all_a_ME)
    itself_B, other_B = torch.cat([target_B, target_B + M]), torch.cat([target_B + M, target_B])
    without_BX = torch.stack([itself_B, other_B], 1)
    negatives_B = fold_columns("logsumexp", query_BE, key_ME, without_BX, whole_logits=whole_logits)
    return F.softplus(negatives_B - (query_BE * key_ME[other_B]).sum(1))
