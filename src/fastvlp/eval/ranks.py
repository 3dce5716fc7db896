"""Retrieval metrics: the exact rank of each query's right answer among all candidates, computed from blocks of the scores.

An image may have several captions; `image_of_text_T` is the index of each caption's image. As in the published evaluations
(ALBEF, open_clip), a text query has one right image, and an image query counts as answered when any of its captions is
found. A caption of another image in the same words is a wrong answer that ties with the right one.

A tie counts against the model: a rank is 1 + the number of wrong candidates that score at least as high as the best right
one. So a model that gives all pairs the same score, or NaN, has the last rank, not the first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastvlp.data.streams import blocks

# The scores [i t] of a slice of the images with a slice of the texts.
Scores = Callable[[slice, slice], Tensor]
# A block of this size stays in a CPU's cache while its scores are counted: twice as fast as 4096.
BLOCK = 1024
# The products of equal vectors at two places of a matrix differ by rounding errors of fp32.
ROUNDING = 1e-6


def cosine(image_IE: Tensor, text_TE: Tensor) -> Scores:
    """Cosines of unit vectors, in fp32."""
    return lambda i, t: image_IE[i] @ text_TE[t].T


def transposed(scores: Scores) -> Scores:
    return lambda t, i: scores(i, t).T


def ranks(
    scores: Scores, image_of_text_T: Tensor, images: int, *, block: int = BLOCK, tie: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Ranks, from 1, of every image's best caption [I] and of every text's image [T].

    All scores are computed once, and those of blocks with right pairs twice. Memory is O(block**2 + I + T).

    Args:
        tie: scores that differ by no more than this count as equal.

    Raises ValueError for an image without a text.
    """
    own_T = own_scores(scores, image_of_text_T, images, block)
    best_I = own_T.new_full((images,), -torch.inf).scatter_reduce(0, image_of_text_T, own_T, "amax")
    if int(image_of_text_T.bincount(minlength=images).min()) == 0:
        raise ValueError("every image needs a text, or it has no rank")
    # "Not below" rather than "at least", so that NaN counts against the model too.
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
    """The score of each text with its own image -> [T], from the same blocks as in `ranks`, because another product would
    round differently."""
    parts = []
    for t in blocks(len(image_of_text_T), block):
        own = image_of_text_T[t]
        part = None
        for i in blocks(images, block):
            here = ((own >= i.start) & (own < i.stop)).nonzero()[:, 0]
            if len(here):
                own_score = scores(i, t)[own[here] - i.start, here]
                part = own_score.new_empty(len(own)) if part is None else part
                part[here] = own_score
        assert part is not None, "a text without an image"
        parts.append(part)
    return torch.cat(parts)


def recall(image_rank_I: Tensor, text_rank_T: Tensor) -> dict[str, float]:
    """R@1, R@5 and R@10 (shares in 0..1), mean and median rank in both directions, and `recall`, the mean of the six R@k."""
    named = {"image_to_text": image_rank_I.double(), "text_to_image": text_rank_T.double()}
    shares = {f"{name}/r{k}": float((rank <= k).double().mean()) for name, rank in named.items() for k in (1, 5, 10)}
    means = {f"{name}/mean_rank": float(rank.mean()) for name, rank in named.items()}
    medians = {f"{name}/median_rank": float(rank.quantile(0.5)) for name, rank in named.items()}
    return shares | means | medians | {"recall": sum(shares.values()) / len(shares)}


def recall_chance(captions_I: Sequence[int]) -> dict[str, float]:
    """Returns the average of `recall` if the order is random, without the median ranks. `captions_I`: captions of each
    image."""
    images, texts = len(captions_I), sum(captions_I)
    shares: dict[str, float] = {}
    for k in (1, 5, 10):
        missed = [math.comb(texts - own, k) / math.comb(texts, k) if k <= texts else 0.0 for own in captions_I]
        shares[f"image_to_text/r{k}"] = 1 - sum(missed) / images
    shares |= {f"text_to_image/r{k}": min(1.0, k / images) for k in (1, 5, 10)}
    image_to_text = sum((texts + 1) / (own + 1) for own in captions_I) / images
    means = {"image_to_text/mean_rank": image_to_text, "text_to_image/mean_rank": (images + 1) / 2}
    return shares | means | {"recall": sum(shares.values()) / len(shares)}


def recall_errors(image_rank_I: Tensor, text_rank_T: Tensor, image_of_text_T: Tensor) -> dict[str, float]:
    """Standard errors of `recall`, without those of the median ranks. The captions of one image depend on each other, so that
    images count as independent, not captions."""
    images, texts = len(image_rank_I), len(text_rank_T)
    if images < 2:
        return {}
    measured = {f"r{k}": (image_rank_I <= k, text_rank_T <= k) for k in (1, 5, 10)}
    measured["mean_rank"] = image_rank_I, text_rank_T
    parts: dict[str, Tensor] = {}  # what each image adds to the difference of a mean from its expectation
    for name, (image, text) in measured.items():
        image_I, text_T = image.double(), text.double()
        parts[f"image_to_text/{name}"] = (image_I - image_I.mean()) / images
        by_image_I = torch.zeros_like(image_I).index_add(0, image_of_text_T, text_T - text_T.mean())
        parts[f"text_to_image/{name}"] = by_image_I / texts
    parts["recall"] = torch.stack([part for name, part in parts.items() if "/r" in name]).mean(0)
    return {name: float((part.square().sum() * images / (images - 1)).sqrt()) for name, part in parts.items()}


class Retrieval(NamedTuple):
    """`recall`, its standard errors, and what it is on average if the order is random; by metric."""

    scores: dict[str, float]
    errors: dict[str, float]
    chance: dict[str, float]


def retrieval(
    image_IE: Tensor, text_TE: Tensor, image_of_text_T: Tensor, *, block: int = BLOCK, tie: float = ROUNDING
) -> Retrieval:
    """Retrieval by the cosines of unit vectors; exact, in O(block**2) memory besides the vectors."""
    both_ranks = ranks(cosine(image_IE, text_TE), image_of_text_T, len(image_IE), block=block, tie=tie)
    captions_I = image_of_text_T.bincount(minlength=len(image_IE)).tolist()
    return Retrieval(recall(*both_ranks), recall_errors(*both_ranks, image_of_text_T), recall_chance(captions_I))


def shortlist(scores: Scores, queries: int, candidates: int, n: int, *, block: int = BLOCK) -> Tensor:
    """The n best candidates of each query, best first -> int64 [Q n]; all of them if there are fewer than n."""
    n = min(n, candidates)
    parts = []
    for q in blocks(queries, block):
        values, places = [], []
        for c in blocks(candidates, block):
            top = scores(q, c).topk(min(n, c.stop - c.start), 1)
            values.append(top.values)
            places.append(top.indices + c.start)
        best = torch.cat(values, 1).topk(n, 1).indices
        parts.append(torch.cat(places, 1).gather(1, best))
    return torch.cat(parts)


def score_shortlists(
    text_IN: Tensor, image_TN: Tensor, score_pairs: Callable[[Sequence[Tensor]], Iterable[Tensor]]
) -> tuple[Tensor, Tensor]:
    """Scores of the shortlists of both directions by a slower model -> [I N], [T N]. A pair on both lists is scored once.

    Args:
        text_IN: the texts on the shortlist of each image.
        image_TN: the images on the shortlist of each text.
        score_pairs: called with the texts to score with image 0, with image 1, ...; yields their scores in this order, so it
            sees each image once.
    """
    images, texts = len(text_IN), len(image_TN)
    row = torch.arange(max(images, texts), device=text_IN.device)[:, None]
    listed = torch.cat([(row[:images] * texts + text_IN).flatten(), (image_TN * texts + row[:texts]).flatten()])
    pair_P, place = listed.unique(return_inverse=True)
    texts_of_image = (pair_P % texts).split((pair_P // texts).bincount(minlength=images).tolist())
    score = torch.cat(list(score_pairs(texts_of_image)))[place]
    return score[: text_IN.numel()].view_as(text_IN), score[text_IN.numel() :].view_as(image_TN)


def reranked(rank_Q: Tensor, score_QN: Tensor, own_QN: Tensor) -> Tensor:
    """Ranks after the candidates on the shortlists were ordered by new scores -> [Q].

    A query whose shortlist has no right candidate keeps its rank, but is at best first behind the list.

    Args:
        rank_Q: ranks by the old scores.
        score_QN: new scores of the shortlists.
        own_QN: which candidates on the shortlists are right.
    """
    best_Q = score_QN.masked_fill(~own_QN, -torch.inf).amax(1)
    ahead_Q = (~own_QN & ~(score_QN < best_Q[:, None])).sum(1)
    return torch.where(own_QN.any(1), 1 + ahead_Q, rank_Q.clamp(min=score_QN.shape[1] + 1))
