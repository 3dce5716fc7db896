"""Heads of UNITER's downstream tasks on a single stream (arXiv 1909.11740, section 4; released code's configs)."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvlp.model.layers import CrossAttention, LayerConfig, initialise


def _head(width: int, hidden: int, outputs: int) -> nn.Sequential:
    head = nn.Sequential(
        nn.Linear(width, hidden), nn.GELU(), nn.LayerNorm(hidden, eps=1e-12), nn.Linear(hidden, outputs)
    )
    initialise(head, width)
    return head


def answer_head(width: int, answers: int) -> nn.Module:
    """The head of VQA and visual entailment: from the pooled state [B D] to logits of the answers [B A]."""
    return _head(width, 2 * width, answers)


def region_head(width: int, layers: Literal[1, 2] = 1) -> nn.Module:
    """The head of referring expressions: from the state of a region to its score, with one layer or (RefCOCO+) two."""
    return nn.Linear(width, 1) if layers == 1 else _head(width, width, 1)


def region_scores(score: nn.Module, region_BRD: Tensor, region_BR: Tensor) -> Tensor:
    """Scores how well each region matches the text -> [B R]; padding has -1e4. `score`: a `region_head`."""
    score_BR: Tensor = score(region_BRD)[..., 0]
    return score_BR.masked_fill(~region_BR, -1e4)


def rank_loss(score_GS: Tensor, margin: float = 0.2) -> Tensor:
    """max(0, margin + sigmoid(wrong) - sigmoid(right)) -> [G S-1]. Each group has the right pair first, then wrong ones."""
    probability_GS = torch.sigmoid(score_GS)
    return F.relu(margin + probability_GS[:, 1:] - probability_GS[:, :1])


class PairAttention(nn.Module):
    """The head of NLVR2 called pair-biattn: a text beside each of two images gives two sequences; each attends to the other,
    and both are pooled by attention (released code: model/nlvr2.py)."""

    def __init__(self, layer: LayerConfig):
        super().__init__()
        width = layer.width
        self.to_right, self.to_left = CrossAttention(layer), CrossAttention(layer)
        self.join = nn.Linear(2 * width, width)
        self.weigh = nn.Linear(width, 1)
        self.out = nn.Linear(2 * width, 2)
        self.drop = nn.Dropout(layer.dropout)
        initialise(self, width)

    def _pooled(self, own: Tensor, own_real: Tensor, attend: CrossAttention, other: Tensor, mask: Tensor) -> Tensor:
        read = attend(own, attend.keys(other), mask[:, None, None])
        x = self.drop(F.relu(self.join(torch.cat([read, own], -1))))
        weight = F.relu(self.weigh(x))[..., 0].masked_fill(~own_real, -1e4).softmax(1)
        pooled: Tensor = self.drop(weight)[:, None] @ x
        return pooled[:, 0]

    def forward(self, left_BSD: Tensor, left_BS: Tensor, right_BSD: Tensor, right_BS: Tensor) -> Tensor:
        """States of words and regions of both sequences, and which of them are no padding -> logits (false, true) [B 2]."""
        left = self._pooled(left_BSD, left_BS, self.to_right, right_BSD, right_BS)
        right = self._pooled(right_BSD, right_BS, self.to_left, left_BSD, left_BS)
        logits: Tensor = self.out(torch.cat([left, right], -1))
        return logits
