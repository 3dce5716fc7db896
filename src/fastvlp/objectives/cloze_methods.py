"""Methods that predict the words of a text one by one from an image and the rest of the text, for models that were trained in
different ways.

A reconstructor (`flm.predict_flm`) and masking see the same context, a causal stream sees less: a fair comparison says
which method it used.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastvlp.batch import Batch
from fastvlp.model import masks
from fastvlp.model.model import Bos, VLModel

# Rows that are read at a time: one for every word of a batch of long texts would not fit.
ROWS = 512


def predict_masked(model: VLModel, image_BKD: Tensor, batch: Batch) -> Tensor:
    """Predicts each word from a copy of the text in which only this word is masked (L-2 rows a text, at most ROWS at a time)
    -> ids [B L]."""
    B, L = batch.ids.shape
    predicted = batch.ids.clone()
    # Of whole texts as many as fit, so that an image's keys are computed once; of a very long text some words.
    texts = max(1, ROWS // max(1, L - 2))
    for rows in torch.arange(B, device=predicted.device).split(texts):
        for first in range(1, L - 1, ROWS):
            position = torch.arange(first, min(first + ROWS, L - 1), device=predicted.device)
            row = position - first
            ids = batch.ids[rows][:, None].repeat(1, len(row), 1)
            ids[:, row, position] = model.config.text.mask
            mask = masks.full(batch.length[rows].repeat_interleave(len(row)), L)
            state = model.read(image_BKD[rows], ids.flatten(0, 1), mask=mask).unflatten(0, (len(rows), len(row)))
            hidden = model.head.hidden(state[:, row, position])
            predicted[rows[:, None], position] = likeliest(hidden, model.head.vocabulary)
    return predicted


def predict_causal(model: VLModel, image_BKD: Tensor, batch: Batch, bos: Bos = "blind") -> Tensor:
    """Predicts each token from the tokens before it -> ids [B L]; column 0 has no prediction.

    After an `official` <s>, which sees the text, the first word is a guess that training never asked for.
    """
    state = model.read_causally(image_BKD, batch.ids, batch.length, bos=bos)[:, :-1]
    head = model.causal_head
    return torch.cat([batch.ids[:, :1], likeliest(head.hidden(state), head.vocabulary)], 1)


def likeliest(hidden: Tensor, vocabulary: nn.Module) -> Tensor:
    """The id with the highest logit of each hidden state: [... D] -> [...]."""
    # Some rows at a time: all logits of a long batch under a large vocabulary would not fit.
    parts = [vocabulary(part).argmax(-1) for part in hidden.flatten(0, -2).split(2048)]
    return torch.cat(parts).view(hidden.shape[:-1])
