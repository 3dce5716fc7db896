"""Two towers: states of an image or a text to one unit vector in a joint space (CLIP, arXiv 2103.00020; FLIP, 2212.00794)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvlp.model.layers import initialise
from fastvlp.model.text import TextConfig

# first: the state at position 0 (class token, <s>, or FLIP's first word). last: the last real token (</s>). mean: over
# all that is there, a class token included (FLIP). patches: over all but the first.
Pool = Literal["first", "last", "mean", "patches"]
# What a word sees in the text tower: all words; those before it (CLIP); or all positions, padding too (FLIP).
TextMask = Literal["full", "causal", "none"]


@dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """norm: a layer norm before pooling, for towers that end without one. hidden: width of a layer with ReLU before the
    projection (None: one linear map). bias: of the projection."""

    pool: Pool
    norm: bool = False
    hidden: int | None = None
    bias: bool = False
    eps: float = 1e-5


@dataclass(frozen=True, kw_only=True)
class EmbedConfig:
    """width: of the joint space. text_special: whether <s> and </s> are encoded (FLIP: not). text_length: texts are cut
    and padded to so many positions, where padding is seen (FLIP: 32); None: the batch's own length."""

    width: int
    image: HeadConfig
    text: HeadConfig
    text_mask: TextMask = "causal"
    text_special: bool = True
    text_length: int | None = None

    def positions(self, length: int) -> int:
        """That the text tower encodes, of texts padded to `length` tokens with <s> and </s>."""
        return self.text_length or max(1, length - int(not self.text_special))


class Head(nn.Module):
    """States [B S D] to unit vectors [B E], in fp32."""

    def __init__(self, config: HeadConfig, width: int, joint: int):
        super().__init__()
        self.pool = config.pool
        self.norm = nn.LayerNorm(width, eps=config.eps) if config.norm else nn.Identity()
        hidden = config.hidden
        self.hidden = nn.Linear(width, hidden) if hidden else None
        self.out = nn.Linear(hidden or width, joint, bias=config.bias)
        initialise(self, width)

    def forward(self, state_BSD: Tensor, length_B: Tensor | None = None) -> Tensor:
        """`length_B`: real states of each row, where some are padding."""
        x = self.pooled(self.norm(state_BSD), length_B)
        if self.hidden is not None:
            x = F.relu(self.hidden(x))
        return unit(self.out(x))

    def pooled(self, state_BSD: Tensor, length_B: Tensor | None) -> Tensor:
        if self.pool == "first":
            return state_BSD[:, 0]
        S = state_BSD.shape[1]
        length_B = length_B if length_B is not None else state_BSD.new_full(state_BSD.shape[:1], S, dtype=torch.long)
        if self.pool == "last":
            return state_BSD[torch.arange(len(state_BSD), device=state_BSD.device), length_B - 1]
        position = torch.arange(S, device=state_BSD.device)
        seen = (position < length_B[:, None]) & (position >= int(self.pool == "patches"))
        weight = seen / seen.sum(1, keepdim=True).clamp(min=1)
        return (state_BSD * weight[..., None].to(state_BSD.dtype)).sum(1)


def unit(x: Tensor) -> Tensor:
    """Rows of length one, in fp32 at least; FLIP's 1e-8 is added to the norm, so that a zero row stays finite."""
    x = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
    return x / (x.norm(dim=-1, keepdim=True) + 1e-8)


class Embed(nn.Module):
    def __init__(self, config: EmbedConfig, image_width: int, text_width: int):
        super().__init__()
        self.config = config
        self.image = Head(config.image, image_width, config.width)
        self.text = Head(config.text, text_width, config.width)

    def words(self, ids_BL: Tensor, length_B: Tensor, text: TextConfig) -> tuple[Tensor, Tensor]:
        """The ids that the text tower encodes, and how many of each row are real. A text of no words keeps one position."""
        config, ids, length = self.config, ids_BL, length_B
        if not config.text_special:
            last = torch.arange(ids.shape[1], device=ids.device) == length[:, None] - 1
            ids, length = ids.masked_fill(last, text.pad)[:, 1:], (length - 2).clamp(min=1)
        if config.text_length is not None:
            more = config.text_length - ids.shape[1]
            ids, length = F.pad(ids, (0, more), value=text.pad), length.clamp(max=config.text_length)
        return ids, length
