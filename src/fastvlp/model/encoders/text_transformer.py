"""The text tower: embedding and the layers that read words alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastvlp.model.layers import LayerConfig, initialise, stack


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """`positions` is the longest text in tokens. `vocab` and the four ids are the tokenizer's (`sizes.with_tokenizer`).

    `position_offset` is the table row of position 0, `pad_position` the row that padding gets (RoBERTa: 2 and 1).
    `embed_norm`: a norm of the embeddings (BERT; not CLIP). `learn_pad`: padding is a word like any other, for towers that
    see it (FLIP).
    """

    positions: int
    depth: int
    layer: LayerConfig
    vocab: int = 0
    pad: int = 0
    bos: int = 0
    eos: int = 0
    mask: int = 0
    embed_eps: float = 1e-5
    position_offset: int = 0
    pad_position: int | None = None
    embed_norm: bool = True
    learn_pad: bool = False


class TextTower(nn.Module):
    def __init__(self, config: TextConfig):
        super().__init__()
        width = config.layer.width
        self.config = config
        self.word = nn.Embedding(config.vocab, width, padding_idx=None if config.learn_pad else config.pad)
        rows = config.positions + config.position_offset
        self.position = nn.Embedding(rows, width, padding_idx=config.pad_position)
        self.norm = nn.LayerNorm(width, eps=config.embed_eps) if config.embed_norm else nn.Identity()
        self.drop = nn.Dropout(config.layer.dropout)
        self.blocks = stack(config.layer, config.depth)
        initialise(self, width)

    def embed(self, ids_BL: Tensor, position_BL: Tensor, kind_D: Tensor | None = None) -> Tensor:
        """Words at their positions -> [B L D]; `kind` is added to each, a type vector. Padding ids keep the padding
        position where the table has one."""
        row_BL = position_BL + self.config.position_offset
        if self.config.pad_position is not None:
            row_BL = torch.where(ids_BL == self.config.pad, self.config.pad_position, row_BL)
        x = self.word(ids_BL) + self.position(row_BL)
        return self.drop(self.norm(x if kind_D is None else x + kind_D))
