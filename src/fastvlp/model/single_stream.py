"""One stream over the words of a text and the regions of an image (UNITER, arXiv 1909.11740, section 3.1)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvlp.batch import Regions
from fastvlp.model.layers import LayerConfig, initialise, stack
from fastvlp.model.region_embedding import RegionConfig, RegionEmbedder


@dataclass(frozen=True, kw_only=True)
class SingleConfig:
    """Config of a single stream."""

    depth: int
    """Number of layers."""
    layer: LayerConfig
    """Shape of each layer; its width is the text encoder's."""
    regions: RegionConfig = field(default_factory=RegionConfig)
    """Embedding of the regions."""
    types: int = 2
    """Number of token types: 0 is that of words, 1 that of the regions of the first image, and so on."""


class SingleStates(NamedTuple):
    """The states that a single stream returns. States of padding have no meaning."""

    text: Tensor  # of words [B L D]
    region: Tensor  # of regions [B R D]
    pooled: Tensor  # of the whole [B D]


class Packing(NamedTuple):
    """The indices that turn rows with padding into rows without padding, and back."""

    source: Tensor  # [B S] the original position that each packed position holds
    real: Tensor  # [B S] whether a packed position holds anything
    place: Tensor  # [B T] the packed position of each original one; for padding, any


def packing(real_BT: Tensor) -> Packing:
    """Moves the real positions of each row to its beginning, in their order. S is the largest number of real positions in a
    row.

    If words and regions are padded separately, rows are T = L + R wide. If batches are made by total length, so that rows with
    many words have few regions, T is a third larger than S.
    """
    count_B1 = real_BT.sum(1, keepdim=True)
    # This waits for the device, because the width decides how much is computed.
    S = max(1, int(count_B1.max()))
    source = (~real_BT).to(torch.uint8).argsort(dim=1, stable=True)[:, :S]
    place = (real_BT.cumsum(1) - 1).clamp(min=0)
    return Packing(source, torch.arange(S, device=real_BT.device) < count_B1, place)


class WordHead(nn.Module):
    """The vocabulary head: Linear, GELU, LayerNorm, and the bias of the vocabulary. The matrix of the vocabulary is the word
    embedding."""

    def __init__(self, width: int, vocab: int, eps: float):
        super().__init__()
        self.transform = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=eps)
        self.bias = nn.Parameter(torch.zeros(vocab))

    def hidden(self, x: Tensor) -> Tensor:
        """Returns the states that are multiplied with the word embedding: [... D] -> [... D]."""
        return self.norm(F.gelu(self.transform(x)))


class SingleStream(nn.Module):
    """Self-attention over words and regions together. `match` gives logits (no match, match) of the pooled state."""

    def __init__(self, config: SingleConfig, vocab: int):
        super().__init__()
        layer, width = config.layer, config.layer.width
        self.config = config
        self.kinds = nn.Parameter(torch.empty(config.types, width))
        self.regions = RegionEmbedder(config.regions, layer)
        self.blocks = stack(layer, config.depth)
        self.norm = nn.LayerNorm(width, eps=layer.eps) if layer.norm == "pre" else nn.Identity()
        self.pool = nn.Linear(width, width)
        self.words = WordHead(width, vocab, layer.eps)
        self.match = nn.Linear(width, 2)
        initialise(self, width)
        self.regions.centre()

    @property
    def heads(self) -> list[nn.Module]:
        """The heads that predict words and matches. The pooler is not among them, since every task reads it."""
        return [self.words, self.match]

    def resized(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns saved weights of a stream with fewer token types, to which the missing types of this stream are added."""
        kinds = state.get("kinds")
        if kinds is None or len(kinds) >= len(self.kinds):
            return dict(state)
        return {**state, "kinds": torch.cat([kinds, self.kinds.detach()[len(kinds) :]])}

    def forward(
        self,
        word_BLD: Tensor,
        length_B: Tensor,
        feature_BRF: Tensor,
        regions: Regions,
        *,
        hidden_BR: Tensor | None = None,
        slot_B: Tensor | None = None,
    ) -> SingleStates:
        """Reads words and regions together.

        Args:
            word_BLD: embedded words, of which `length_B` are real.
            feature_BRF: features of the regions, masked where `hidden_BR`.
            slot_B: number of the image in its pair, for each row [B] or for each region [B R]; None means the first image.
        """
        kind = self.kinds[1] if slot_B is None else self.kinds[1 + slot_B]
        kind = kind if slot_B is None or slot_B.dim() == 2 else kind[:, None]
        region_BRD = self.regions(feature_BRF, regions.box, kind, hidden_BR)
        L, R = word_BLD.shape[1], region_BRD.shape[1]
        word_BL = torch.arange(L, device=length_B.device) < length_B[:, None]
        pack = packing(torch.cat([word_BL, regions.mask], 1))
        x = torch.cat([word_BLD, region_BRD], 1).take_along_dim(pack.source[..., None], 1)
        for block in self.blocks:
            x = block(x, mask=pack.real[:, None, None])
        text, region = self.norm(x).take_along_dim(pack.place[..., None], 1).split([L, R], 1)
        return SingleStates(text, region, torch.tanh(self.pool(text[:, 0])))
