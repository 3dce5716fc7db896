"""Cloze: how many words of a caption a model gets right from the image and the context that its method gives it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fastvlp.batch import Batch
from fastvlp.eval.mode import evaluating
from fastvlp.model import masks
from fastvlp.model.model import Bos, VLModel
from fastvlp.objectives.flm import FLM, FLMConfig, draw_spans

# flm: every token from all others through the reconstructor. mask: each token masked alone, read both ways. causal: from
# the tokens before it. The first two see the same context, the last one less: a fair comparison says which it is.
Means = Literal["flm", "mask", "causal"]

# Rows that are read at a time: one for every word of a batch of long texts would not fit.
ROWS = 512


class Cloze(NamedTuple):
    accuracy: float
    words: int


def word_positions(length_B: Tensor, L: int) -> Tensor:
    """Positions 1..n-2, the same targets for every means: bool [B L]; <s> and </s> are no words."""
    position = torch.arange(L, device=length_B.device)
    return (position >= 1) & (position < length_B[:, None] - 1)


def predict_flm(model: VLModel, image_BKD: Tensor, batch: Batch, bos: Bos) -> Tensor:
    """Each token from all others in one pass -> ids [B L]; column 0 holds no prediction."""
    spans = draw_spans("token", 0.0, batch.seed, batch.length, batch.ids.shape[1])
    streams = model.streams(image_BKD, batch.ids, batch.length, bos=bos)
    state = FLM(FLMConfig(bos=bos)).queries(batch, spans, streams, model)
    return torch.cat([batch.ids[:, :1], _best(model.head.hidden(state), model.head.vocabulary)], 1)


def predict_masked(model: VLModel, image_BKD: Tensor, batch: Batch) -> Tensor:
    """Each word masked alone, L-2 rows a text, at most ROWS of them at a time -> ids [B L]."""
    B, L = batch.ids.shape
    found = batch.ids.clone()
    # Of whole texts as many as fit, so that an image's keys are computed once; of a very long text some words.
    texts = max(1, ROWS // max(1, L - 2))
    for rows in torch.arange(B, device=found.device).split(texts):
        for first in range(1, L - 1, ROWS):
            asked = torch.arange(first, min(first + ROWS, L - 1), device=found.device)
            row = asked - first
            ids = batch.ids[rows][:, None].repeat(1, len(row), 1)
            ids[:, row, asked] = model.config.text.mask
            mask = masks.full(batch.length[rows].repeat_interleave(len(row)), L)
            state = model.read(image_BKD[rows], ids.flatten(0, 1), mask=mask).unflatten(0, (len(rows), len(row)))
            found[rows[:, None], asked] = _best(model.head.hidden(state[:, row, asked]), model.head.vocabulary)
    return found


def predict_causal(model: VLModel, image_BKD: Tensor, batch: Batch, bos: Bos) -> Tensor:
    """Each token from those before it -> ids [B L]; column 0 holds no prediction.

    After an `official` <s>, which sees the text, the first word is a guess that training never asked for.
    """
    state = model.read_causally(image_BKD, batch.ids, batch.length, bos=bos)[:, :-1]
    head = model.causal_head
    return torch.cat([batch.ids[:, :1], _best(head.hidden(state), head.vocabulary)], 1)


def _best(hidden: Tensor, vocabulary: torch.nn.Module) -> Tensor:
    # Some rows at a time: all logits of a long batch under a large vocabulary would not fit.
    parts = [vocabulary(part).argmax(-1) for part in hidden.flatten(0, -2).split(2048)]
    return torch.cat(parts).view(hidden.shape[:-1])


def cloze(model: VLModel, means: Means, batches: Iterable[Batch], *, bos: Bos = "blind") -> Cloze:
    """Share of words predicted right. Batches are moved to the model's device; the caller chooses autocast.

    `bos` is what the model was pretrained with; `mask` does not read it.
    """
    right, count = 0, 0
    device = next(model.parameters()).device
    with evaluating(model):
        for batch in (b.to(device) for b in batches):
            asked = word_positions(batch.length, batch.ids.shape[1])
            if not bool(asked.any()):
                continue
            image_BKD = model.encode_image(batch.image)
            if means == "flm":
                predicted = predict_flm(model, image_BKD, batch, bos)
            elif means == "mask":
                predicted = predict_masked(model, image_BKD, batch)
            else:
                predicted = predict_causal(model, image_BKD, batch, bos)
            right += int((predicted == batch.ids)[asked].sum())
            count += int(asked.sum())
    return Cloze(right / count if count else float("nan"), count)
