"""Two towers: states of an image or a text to one unit vector in a joint space (CLIP, arXiv 2103.00020; FLIP, 2212.00794;
BriVL, 2103.06561)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvlp.batch import Regions
from fastvlp.errors import UserError
from fastvlp.model.encoders.interface import ImageEncoderConfig, TextEncoderConfig
from fastvlp.model.layers import LayerConfig, initialise, stack
from fastvlp.model.region_pooling import RegionPool, RegionPooling

# first: the state at position 0 (class token, <s>, or FLIP's first word). last: the last real token (</s>). mean: over
# all that is there, a class token included (FLIP). patches: over all but the first.
Pool = Literal["first", "last", "mean", "patches"]
# What a word sees in the text tower: all words; those before it (CLIP); or all positions, padding too (FLIP).
TextMask = Literal["full", "causal", "none"]


@dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """norm: a layer norm before pooling, for towers that end without one. hidden: width of a layer with ReLU before the
    projection (None: one linear map). bias: of the projection.

    regions: the image's states become regions pooled from their map (BriVL). depth, layer: blocks of self-attention over
    states or regions, each made a unit vector first, without positions (BriVL); 0 for none."""

    pool: Pool
    norm: bool = False
    hidden: int | None = None
    bias: bool = False
    eps: float = 1e-5
    regions: RegionPool | None = None
    depth: int = 0
    layer: LayerConfig | None = None


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

    @property
    def reads_boxes(self) -> bool:
        """Whether an image's boxes must come along."""
        return self.image.regions is not None and self.image.regions.grid is None

    def positions(self, length: int) -> int:
        """That the text tower encodes, of texts padded to `length` tokens with <s> and </s>."""
        return self.text_length or max(1, length - int(not self.text_special))


def check_head(name: str, head: HeadConfig, width: int) -> None:
    """Raises UserError for a head that cannot be built on states of `width`."""
    layer, regions, field = head.layer, head.regions, f"model.embed.{name}"
    if head.depth and layer is None:
        raise UserError(f"{field}.depth {head.depth}: say with {field}.layer how wide the blocks are")
    if layer is not None and (layer.heads < 1 or layer.width % layer.heads):
        raise UserError(f"{field}.layer: width {layer.width} does not divide into {layer.heads} heads")
    if layer is not None and regions is None and layer.width != width:
        raise UserError(
            f"{field}.layer.width {layer.width} must equal the tower's width {width}, where nothing is pooled"
        )
    if regions is None:
        return
    if name == "text" or head.pool != "mean":
        raise UserError(f"{field}.regions: regions are of an image, and their mean is its summary (pool mean)")
    if regions.samples < 1 or (regions.grid is not None and regions.grid < 1):
        raise UserError(f"{field}.regions: samples {regions.samples}, grid {regions.grid}; use 1 or more")


class Head(nn.Module):
    """States [B S D] to unit vectors [B E], in fp32. `image`: the tower's shape, where its regions are pooled."""

    def __init__(self, config: HeadConfig, width: int, joint: int, image: ImageEncoderConfig | None = None):
        super().__init__()
        self.pool = config.pool
        self.norm = nn.LayerNorm(width, eps=config.eps) if config.norm else nn.Identity()
        inner = config.layer.width if config.layer else width
        self.regions = RegionPooling(config.regions, image, inner) if config.regions and image else None
        self.blocks = stack(config.layer, config.depth) if config.layer else []
        hidden = config.hidden
        self.hidden = nn.Linear(inner, hidden) if hidden else None
        self.out = nn.Linear(hidden or inner, joint, bias=config.bias)
        initialise(self, inner)

    def forward(self, state_BSD: Tensor, length_B: Tensor | None = None, regions: Regions | None = None) -> Tensor:
        """`length_B`: real states of each row, where some are padding. `regions`: a batch's, where the head reads them."""
        x = self.summary(state_BSD, length_B, regions)
        if self.hidden is not None:
            x = F.relu(self.hidden(x))
        return unit(self.out(x))

    def summary(self, state_BSD: Tensor, length_B: Tensor | None = None, regions: Regions | None = None) -> Tensor:
        """What the projection reads [B D]."""
        x, seen_BS = self.norm(state_BSD), None
        if self.regions is not None:
            x, seen_BS = self.regions(x, regions)
        elif length_B is not None:
            seen_BS = torch.arange(x.shape[1], device=x.device) < length_B[:, None]
        if self.blocks:
            x = unit(x).to(x.dtype)
            mask = None if seen_BS is None else seen_BS[:, None, None]
            for block in self.blocks:
                x = block(x, mask=mask)
        return self.pooled(x, seen_BS)

    def pooled(self, state_BSD: Tensor, seen_BS: Tensor | None) -> Tensor:
        """`seen_BS`: which states are there; None: all."""
        if self.pool == "first":
            return state_BSD[:, 0]
        if seen_BS is None:
            seen_BS = torch.ones(state_BSD.shape[:2], dtype=torch.bool, device=state_BSD.device)
        if self.pool == "last":
            return state_BSD[torch.arange(len(state_BSD), device=state_BSD.device), seen_BS.sum(1) - 1]
        if self.pool == "patches":
            seen_BS = seen_BS & (torch.arange(state_BSD.shape[1], device=state_BSD.device) > 0)
        weight = seen_BS / seen_BS.sum(1, keepdim=True).clamp(min=1)
        return (state_BSD * weight[..., None].to(state_BSD.dtype)).sum(1)


def unit(x: Tensor) -> Tensor:
    """Rows of length one, in fp32 at least; FLIP's 1e-8 is added to the norm, so that a zero row stays finite."""
    x = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
    return x / (x.norm(dim=-1, keepdim=True) + 1e-8)


class Embed(nn.Module):
    def __init__(self, config: EmbedConfig, image: ImageEncoderConfig, text_width: int):
        super().__init__()
        self.config = config
        self.image = Head(config.image, image.width, config.width, image)
        self.text = Head(config.text, text_width, config.width)

    def words(self, ids_BL: Tensor, length_B: Tensor, text: TextEncoderConfig) -> tuple[Tensor, Tensor]:
        """The ids that the text tower encodes, and how many of each row are real. A text of no words keeps one position."""
        config, ids, length = self.config, ids_BL, length_B
        if not config.text_special:
            last = torch.arange(ids.shape[1], device=ids.device) == length[:, None] - 1
            ids, length = ids.masked_fill(last, text.pad)[:, 1:], (length - 2).clamp(min=1)
        if config.text_length is not None:
            more = config.text_length - ids.shape[1]
            ids, length = F.pad(ids, (0, more), value=text.pad), length.clamp(max=config.text_length)
            if config.text_special:
                # A text that is cut ends all the same: </s> may be what is pooled.
                end = torch.arange(ids.shape[1], device=ids.device) == length[:, None] - 1
                ids = ids.masked_fill(end, text.eos)
        return ids, length
