"""Writes captions token by token from the forward stream. Keys and values of earlier tokens are kept."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvlp.model.model import Cache, VLModel


def next_scores(model: VLModel, ids_B: Tensor, cache: Cache) -> Tensor:
    """Log-probabilities of the token after `ids` -> [B V]; padding, <s> and the mask have none."""
    logits: Tensor = model.causal_head(model.step(ids_B, cache)).float()
    text = model.config.text
    logits[:, [text.pad, text.bos, text.mask]] = float("-inf")
    return logits.log_softmax(-1)


def length_limit(model: VLModel, most: int) -> int:
    """`most` tokens, or as many as the model has positions for after `<s>`."""
    return min(most, model.config.text.positions - 1)


@torch.no_grad()
def greedy(model: VLModel, image_BKD: Tensor, most: int = 30) -> Tensor:
    """The most probable token at each place, up to </s> or `most` tokens -> ids [B T] without <s>, padded after </s>."""
    text = model.config.text
    cache = model.begin(image_BKD)
    token = torch.full(image_BKD.shape[:1], text.bos, device=image_BKD.device)
    done = torch.zeros_like(token, dtype=torch.bool)
    written: list[Tensor] = []
    while len(written) < length_limit(model, most) and not done.all():
        token = next_scores(model, token, cache).argmax(-1).masked_fill(done, text.pad)
        written.append(token)
        done = done | (token == text.eos)
    return torch.stack(written, 1)


@torch.no_grad()
def beam_search(
    model: VLModel, image_BKD: Tensor, beams: int = 4, most: int = 30, length_penalty: float = 0.0
) -> tuple[Tensor, Tensor]:
    """The best of the captions that a search with `beams` captions at a time meets -> ids [B T] as from `greedy`, and their
    scores [B].

    A caption's score is its log-probability / tokens**length_penalty, </s> included: 0 favours short captions, 1 is the mean.
    A finished caption stays among the beams as long as it is one of the best. The best finished caption is returned, or
    the best unfinished one where none has ended.
    """
    B, K, text = image_BKD.shape[0], beams, model.config.text
    device = image_BKD.device
    cache = model.begin(image_BKD)
    # All beams of an image share its keys; only those of the text are copied.
    row_BK = torch.arange(B, device=device)[:, None].expand(B, K)
    cache = cache.select(row_BK.flatten())
    token = torch.full((B * K,), text.bos, device=device)
    total = torch.full((B, K), float("-inf"), device=device)
    total[:, 0] = 0.0
    count = torch.zeros(B, K, device=device)
    done = torch.zeros(B, K, dtype=torch.bool, device=device)
    written = torch.empty(B, K, 0, dtype=torch.int64, device=device)
    best, best_ids = torch.full((B,), float("-inf"), device=device), written[:, 0]
    for _ in range(length_limit(model, most)):
        scores = next_scores(model, token, cache).view(B, K, -1)
        # A finished beam continues with padding, which leaves its score as it is.
        scores = scores.masked_fill(done[..., None], float("-inf"))
        scores[..., text.pad] = scores[..., text.pad].masked_fill(done, 0.0)
        totals = total[..., None] + scores
        count = count + ~done
        V = scores.shape[-1]
        pick = (totals / count[..., None] ** length_penalty).flatten(1).topk(K).indices
        parent, token_BK = pick // V, pick % V
        total, count = totals.flatten(1).gather(1, pick), count.gather(1, parent)
        written = torch.cat([written.gather(1, parent[..., None].expand_as(written)), token_BK[..., None]], -1)
        done = done.gather(1, parent) | (token_BK == text.eos)
        score = (total / count**length_penalty).masked_fill(~done, float("-inf"))
        top, which = score.max(1)
        better = top > best
        best = torch.where(better, top, best)
        padded = torch.nn.functional.pad(best_ids, (0, 1), value=text.pad)
        best_ids = torch.where(better[:, None], written[torch.arange(B, device=device), which], padded)
        if bool(done.all()):
            break
        token = token_BK.flatten()
        cache = cache.select((parent + row_BK * K).flatten())
    unfinished = torch.isinf(best)
    score, which = (total / count**length_penalty).max(1)
    best_ids = torch.where(unfinished[:, None], written[torch.arange(B, device=device), which], best_ids)
    return best_ids, torch.where(unfinished, score, best)
