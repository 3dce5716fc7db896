"""Retrieval as numbers: each query's rank among all candidates, exactly, from scores that are seen a block at a time.

An image may have several captions; `image_of_text_T` says whose each is. As in the published evaluations (ALBEF,
open_clip) a text query has one right image, an image query is answered when any of its captions is found, and a caption
that another image has in the same words is a wrong answer all the same: the two tie.

A tie counts against us: a rank is 1 + the wrong candidates that score at least as high as the best right one. A model that
scores all pairs alike, or with NaN, so has the last rank and not the first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from fastvlp.data.streams import blocks

# The scores [i t] of some images beside some texts.
Scores = Callable[[slice, slice], Tensor]
# So few scores stay in the cache of a CPU while they are counted: twice as fast as 4096.
BLOCK = 1024
# Products of equal vectors at two places of a matrix differ by the rounding of fp32.
ROUNDING = 1e-6


def cosine(image_IE: Tensor, text_TE: Tensor) -> Scores:
    """Of unit vectors, in fp32."""
    return lambda i, t: image_IE[i] @ text_TE[t].T


def transposed(scores: Scores) -> Scores:
    return lambda t, i: scores(i, t).T


def ranks(
    scores: Scores, image_of_text_T: Tensor, images: int, *, block: int = BLOCK, tie: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Ranks from 1 of every image's best caption [I] and of every text's image [T], by one pass over all scores (and one
    over the blocks that hold right pairs). Memory is O(block**2 + I + T).

    tie: scores that differ by no more than this are equal. Raises ValueError for an image without a text.
    """
    own_T = own_scores(scores, image_of_text_T, images, block)
    best_I = own_T.new_full((images,), -torch.inf).scatter_reduce(0, image_of_text_T, own_T, "amax")
    if int(image_of_text_T.bincount(minlength=images).min()) == 0:
        raise ValueError("every image needs a text, or it has no rank")
    # Written as "not below", so that NaN, which is below nothing, counts against us too.
    near_T = ~(own_T < (best_I - tie)[image_of_text_T])
    image_rank_I = 1 - torch.zeros_like(best_I, dtype=torch.int64).index_add(0, image_of_text_T, near_T.long())
    text_rank_T = torch.zeros_like(image_of_text_T)
    for i in blocks(images, block):
        for t in blocks(len(own_T), block):
            score = scores(i, t)
            image_rank_I[i] += score.shape[1] - (score < best_I[i, None] - tie).sum(1)
            text_rank_T[t] += score.shape[0] - (score < own_T[t] - tie).sum(0)
    return image_rank_I, text_rank_T


def own_scores(scores: Scores, image_of_text_T: Tensor, images: int, block: int = BLOCK) -> Tensor:
    """Of each text beside its own image -> [T], from the blocks that `ranks` sees: another product would round otherwise."""
    parts = []
    for t in blocks(len(image_of_text_T), block):
        own = image_of_text_T[t]
        part = None
        for i in blocks(images, block):
            here = ((own >= i.start) & (own < i.stop)).nonzero()[:, 0]
            if len(here):
                found = scores(i, t)[own[here] - i.start, here]
                part = found.new_empty(len(own)) if part is None else part
                part[here] = found
        assert part is not None, "a text of no image"
        parts.append(part)
    return torch.cat(parts)


def recall(image_rank_I: Tensor, text_rank_T: Tensor) -> dict[str, float]:
    """Shares in the top 1, 5 and 10, mean and median rank of both directions, and `recall`, the mean of the six shares."""
    named = {"image_to_text": image_rank_I.double(), "text_to_image": text_rank_T.double()}
    shares = {f"{name}/r{k}": float((rank <= k).double().mean()) for name, rank in named.items() for k in (1, 5, 10)}
    means = {f"{name}/mean_rank": float(rank.mean()) for name, rank in named.items()}
    medians = {f"{name}/median_rank": float(rank.quantile(0.5)) for name, rank in named.items()}
    return shares | means | medians | {"recall": sum(shares.values()) / len(shares)}


def retrieval_scores(
    image_IE: Tensor, text_TE: Tensor, image_of_text_T: Tensor, *, block: int = BLOCK, tie: float = ROUNDING
) -> dict[str, float]:
    """`recall` of unit vectors by their cosine: exact, in O(block**2) memory beside the vectors themselves."""
    return recall(*ranks(cosine(image_IE, text_TE), image_of_text_T, len(image_IE), block=block, tie=tie))


def shortlist(scores: Scores, queries: int, candidates: int, n: int, *, block: int = BLOCK) -> Tensor:
    """The n best candidates of each query (all, where there are fewer), best first -> int64 [Q n]."""
    n = min(n, candidates)
    found = []
    for q in blocks(queries, block):
        values, places = [], []
        for c in blocks(candidates, block):
            top = scores(q, c).topk(min(n, c.stop - c.start), 1)
            values.append(top.values)
            places.append(top.indices + c.start)
        best = torch.cat(values, 1).topk(n, 1).indices
        found.append(torch.cat(places, 1).gather(1, best))
    return torch.cat(found)


def rerank(
    text_IN: Tensor, image_TN: Tensor, score_pairs: Callable[[Sequence[Tensor]], Iterable[Tensor]]
) -> tuple[Tensor, Tensor]:
    """Scores of both directions' shortlists by a slower model -> [I N], [T N]. A pair that is on both lists is scored once.

    score_pairs: is given the texts that are asked for beside image 0, beside image 1, ..., and yields their scores in
        this order; so it meets each image once.
    """
    images, texts = len(text_IN), len(image_TN)
    row = torch.arange(max(images, texts), device=text_IN.device)[:, None]
    asked = torch.cat([(row[:images] * texts + text_IN).flatten(), (image_TN * texts + row[:texts]).flatten()])
    pair_P, place = asked.unique(return_inverse=True)
    texts_of_image = (pair_P % texts).split((pair_P // texts).bincount(minlength=images).tolist())
    score = torch.cat(list(score_pairs(texts_of_image)))[place]
    return score[: text_IN.numel()].view_as(text_IN), score[text_IN.numel() :].view_as(image_TN)


def reranked(rank_Q: Tensor, score_QN: Tensor, own_QN: Tensor) -> Tensor:
    """Ranks after the first N candidates were put in the order of new scores -> [Q]. `own_QN`: which of them are right.
    A query whose shortlist misses keeps the rank that it had, behind the list."""
    best_Q = score_QN.masked_fill(~own_QN, -torch.inf).amax(1)
    ahead_Q = (~own_QN & ~(score_QN < best_Q[:, None])).sum(1)
    return torch.where(own_QN.any(1), 1 + ahead_Q, rank_Q.clamp(min=score_QN.shape[1] + 1))
