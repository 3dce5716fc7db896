"""A text transformer: BERT's, RoBERTa's, CLIP's or FLIP's, by its fields."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fastvlp.config import Positive
from fastvlp.model.encoders.interface import TextEncoder, TextEncoderConfig
from fastvlp.model.encoders.layer_names import LayerNames, layers_in
from fastvlp.model.layers import KeyValue, LayerConfig, initialise, stack


@dataclass(frozen=True, kw_only=True)
class TextTransformerConfig(TextEncoderConfig):
    """Learned word and position tables, and transformer layers."""

    depth: int
    """Number of layers."""
    layer: LayerConfig
    """Shape of each layer."""
    embed_eps: Positive = 1e-5
    """Epsilon of the norm of the embeddings."""
    position_offset: int = 0
    """Row of the position table for position 0 (RoBERTa: 2)."""
    pad_position: int | None = None
    """Row of the position table for padding (RoBERTa: 1); None: the row of its position, as for other tokens."""
    embed_norm: bool = True
    """Whether a layer norm follows the embeddings (BERT; not CLIP)."""
    learn_pad: bool = False
    """Whether the embedding of padding is learned, for layers that attend to it (FLIP)."""
    last_norm: bool = False
    """Whether a layer norm follows the last layer (CLIP). Without it, parts that read the states of pre-norm layers have a norm
    of their own."""

    @property
    def width(self) -> int:
        return self.layer.width

    @property
    def final_norm(self) -> bool:
        return self.layer.norm == "post" or self.last_norm

    @property
    def norm_eps(self) -> float:
        return self.layer.eps

    def check(self) -> None:
        super().check()
        self.layer.check("model.text.layer")

    def with_depth(self, depth: int) -> TextTransformerConfig:
        return replace(self, depth=depth, last_norm=self.last_norm and depth > 0)

    def build(self) -> TextTransformer:
        return TextTransformer(self)


def with_positions(table_RD: Tensor, rows: int, offset: int = 0) -> Tensor:
    """A table of positions with `rows` rows: the first ones, or all of them again and again, as Longformer begins
    (arXiv 2004.05150, section 5). The `offset` rows at the start, which stand for no position, stay."""
    if len(table_RD) == rows:
        return table_RD
    places = torch.arange(rows - offset, device=table_RD.device) % max(1, len(table_RD) - offset)
    return torch.cat([table_RD[:offset], table_RD[offset:][places]])


class TextTransformer(TextEncoder):
    def __init__(self, config: TextTransformerConfig):
        super().__init__()
        width = config.width
        self.config = config
        self.word = nn.Embedding(config.vocab, width, padding_idx=None if config.learn_pad else config.pad)
        rows = config.positions + config.position_offset
        self.position = nn.Embedding(rows, width, padding_idx=config.pad_position)
        self.norm = nn.LayerNorm(width, eps=config.embed_eps) if config.embed_norm else nn.Identity()
        self.drop = nn.Dropout(config.layer.dropout)
        self.blocks = stack(config.layer, config.depth)
        self.last_norm = nn.LayerNorm(width, eps=config.layer.eps) if config.last_norm else nn.Identity()
        initialise(self, width)

    @property
    def word_table(self) -> Tensor:
        return self.word.weight

    def embed(self, ids_BL: Tensor, position_BL: Tensor, kind: Tensor | None = None) -> Tensor:
        row_BL = position_BL + self.config.position_offset
        if self.config.pad_position is not None:
            row_BL = torch.where(ids_BL == self.config.pad, self.config.pad_position, row_BL)
        x = self.word(ids_BL) + self.position(row_BL)
        return self.drop(self.norm(x if kind is None else x + kind))

    def states(
        self, ids_BL: Tensor, position_BL: Tensor, *, mask: Tensor | None = None, causal: bool = False
    ) -> list[Tensor]:
        states = [self.embed(ids_BL, position_BL)]
        for block in self.blocks:
            states.append(block(states[-1], mask=mask, causal=causal))
        states[-1] = self.last_norm(states[-1])
        return states

    def empty_past(self, like_B: Tensor) -> list[KeyValue]:
        return [KeyValue.empty(self.config.layer, like_B) for _ in self.blocks]

    def step(self, ids_B1: Tensor, position_B1: Tensor, past: list[KeyValue]) -> Tensor:
        x = self.embed(ids_B1, position_B1)
        for block, own in zip(self.blocks, past, strict=True):
            x = block(x, past=own)
        return self.last_norm(x)

    def layer_names(self) -> LayerNames:
        return layers_in(self, "blocks")

    def resized(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if "position" not in {name.partition(".")[0] for name in state}:
            return dict(state)
        table = with_positions(state["position.weight"], len(self.position.weight), self.config.position_offset)
        return {**state, "position.weight": table}
