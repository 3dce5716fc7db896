"""A joint space: the states of an image or a text become one unit vector (CLIP, arXiv 2103.00020; FLIP, 2212.00794; BriVL,
2103.06561)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvlp.batch import Regions
from fastvlp.errors import UserError
from fastvlp.model.encoders.interface import ImageEncoderConfig, TextEncoderConfig
from fastvlp.model.layers import ACTIVATIONS, CrossAttention, LayerConfig, initialise, stack
from fastvlp.model.region_pooling import RegionPool, RegionPooling

# first: the state at position 0 (class token, <s>, or FLIP's first word). last: the state of the last token before padding
# (</s>). end: the state of the last position, even if it is padding (SigLIP). mean: the mean of all states except padding,
# including the class token (FLIP). patches: the mean of all states except the first. attention: the output of attention with
# a learned query over all states (SigLIP).
Pool = Literal["first", "last", "end", "mean", "patches", "attention"]
# The tokens that a word attends to in the text encoder. full: all words. causal: itself and the words before it (CLIP). none:
# all positions, including padding (FLIP).
TextMask = Literal["full", "causal", "none"]


@dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """A head that computes one vector from the states of an image or a text."""

    pool: Pool
    """How the states are pooled: first state, last state before padding, state at the end of all positions, mean of all states,
    mean of all except the first (patches), or attention with a learned query."""
    norm: bool = False
    """Whether a layer norm comes first, for encoders that do not end with one."""
    hidden: int | None = None
    """Width of a hidden layer before the projection; None: no hidden layer."""
    hidden_activation: Literal["relu", "tanh"] = "relu"
    """Activation function of the hidden layer: relu (BriVL), or tanh (BERT's pooler)."""
    skip: bool = False
    """Whether a second projection, which bypasses the hidden layer, is added to the output."""
    dropout: float = 0.0
    """Share of the hidden layer's outputs that is set to zero in training."""
    bias: bool = False
    """Whether the projection has a bias."""
    project: bool = True
    """Whether there is a projection. Without one the pooled state is the vector (SigLIP's images)."""
    eps: float = 1e-5
    """Epsilon of the norm."""
    regions: RegionPool | None = None
    """Regions that are pooled from the map of the image's states, and used instead of the states (BriVL)."""
    depth: int = 0
    """Number of self-attention layers over states or regions, without positions, before they are pooled (BriVL)."""
    layer: LayerConfig | None = None
    """Shape of these layers, and of the attention that pools."""

    def check(self, name: str, width: int, joint: int) -> None:
        """Raises UserError if the head cannot be built on states of `width`, for a joint space of `joint` dimensions. `name`:
        image or text."""
        layer, regions, field = self.layer, self.regions, f"model.embed.{name}"
        inner = self.hidden or (width if layer is None else layer.width)
        if not self.project and inner != joint:
            raise UserError(
                f"`{field}.project` is off, but the pooled state has {inner} dimensions and `model.embed.width` is {joint}"
            )
        if self.hidden is None and (self.skip or self.dropout):
            given = "skip" if self.skip else "dropout"
            raise UserError(f"`{field}.{given}` needs a hidden layer; set its width, `{field}.hidden`")
        if layer is None and (self.depth or self.pool == "attention"):
            what = f"`{field}.depth` is {self.depth}" if self.depth else f"`{field}.pool` is attention"
            raise UserError(f"{what}: also set the shape of these layers, `{field}.layer`")
        if layer is not None:
            layer.check(f"{field}.layer")
            if regions is None and layer.width != width:
                raise UserError(
                    f"`{field}.layer.width` {layer.width} must equal the encoder's width {width} if no regions are pooled"
                )
        if regions is None:
            return
        if name == "text" or self.pool != "mean":
            raise UserError(f"`{field}.regions` can only be used by the image head, and with pool mean")
        if regions.samples < 1 or (regions.grid is not None and regions.grid < 1):
            raise UserError(f"`{field}.regions`: samples {regions.samples}, grid {regions.grid}; use 1 or more")


@dataclass(frozen=True, kw_only=True)
class EmbedConfig:
    """A joint space of images and texts."""

    width: int
    """Dimension of the joint space."""
    image: HeadConfig
    """Head of the images."""
    text: HeadConfig
    """Head of the texts."""
    text_mask: TextMask = "causal"
    """The tokens that a word attends to: all words (full), itself and the words before it (causal), or all positions including
    padding (none)."""
    text_special: bool = True
    """Whether <s> and </s> are encoded (not in FLIP)."""
    text_start: bool = True
    """Whether <s> is encoded if </s> is (not in SigLIP)."""
    text_length: int | None = None
    """Length to which every text is cut and padded, for encoders that attend to padding (FLIP: 32); None: the longest text of
    the batch."""
    text_pad: int | None = None
    """Id of this padding (SigLIP: that of </s>); None: the tokenizer's."""

    def check(self, image: ImageEncoderConfig, text: TextEncoderConfig) -> None:
        """Raises UserError if the heads cannot be built on these encoders."""
        self.image.check("image", image.width, self.width)
        self.text.check("text", text.width, self.width)
        if self.image.pool == "patches" and not image.prefix:
            raise UserError(
                "`model.embed.image.pool` patches leaves out the class token, but the encoder has none; choose mean"
            )
        if self.text_length is not None and not 1 <= self.text_length <= text.positions:
            raise UserError(
                f"`model.embed.text_length` {self.text_length} is not within the {text.positions} text positions"
            )

    @property
    def reads_boxes(self) -> bool:
        """Whether the data must have boxes for each image."""
        return self.image.regions is not None and self.image.regions.grid is None

    @property
    def sees_padding(self) -> bool:
        """Whether the vector of a text depends on how far it is padded."""
        return self.text_mask == "none" or self.text_length is not None or self.text.pool == "end"

    def positions(self, length: int) -> int:
        """Returns the number of encoded positions of texts that are padded to `length` tokens, including <s> and </s>."""
        return self.text_length or max(1, length - int(not (self.text_special and self.text_start)))


class AttentionPooling(nn.Module):
    """A learned query that reads all states, then an MLP: SigLIP's and big_vision's MAP head (arXiv 2303.15343)."""

    def __init__(self, layer: LayerConfig):
        super().__init__()
        self.query = nn.Parameter(torch.empty(layer.width))
        self.cross = CrossAttention(layer)
        self.norm = nn.LayerNorm(layer.width, eps=layer.eps)
        self.mlp_in = nn.Linear(layer.width, layer.hidden)
        self.mlp_out = nn.Linear(layer.hidden, layer.width)
        self.activation = ACTIVATIONS[layer.activation]

    def forward(self, state_BSD: Tensor, seen_BS: Tensor | None) -> Tensor:
        """Returns the output of attention with the query [B D]. `seen_BS`: True for states that are not padding; None means
        all."""
        query_B1D = self.query.to(state_BSD.dtype).expand(state_BSD.shape[0], 1, -1)
        mask = None if seen_BS is None else seen_BS[:, None, None]
        x = self.cross(query_B1D, self.cross.keys(state_BSD), mask)[:, 0]
        return x + self.mlp_out(self.activation(self.mlp_in(self.norm(x))))


class Head(nn.Module):
    """Maps states [B S D] to unit vectors [B E], in fp32."""

    def __init__(self, config: HeadConfig, width: int, joint: int, image: ImageEncoderConfig | None = None):
        """`width`: dimension of the states. `joint`: dimension of the joint space. `image`: the image encoder, only for the
        head of the images."""
        super().__init__()
        self.pool = config.pool
        self.norm = nn.LayerNorm(width, eps=config.eps) if config.norm else nn.Identity()
        inner = config.layer.width if config.layer else width
        self.regions = RegionPooling(config.regions, image, inner) if config.regions and image else None
        self.blocks = stack(config.layer, config.depth) if config.layer else []
        self.attention = AttentionPooling(config.layer) if config.pool == "attention" and config.layer else None
        hidden = config.hidden
        self.hidden = nn.Linear(inner, hidden) if hidden else None
        self.activation = torch.tanh if config.hidden_activation == "tanh" else F.relu
        self.drop = nn.Dropout(config.dropout)
        self.skip = nn.Linear(inner, joint, bias=False) if config.skip else None
        self.out = nn.Linear(hidden or inner, joint, bias=config.bias) if config.project else nn.Identity()
        initialise(self, inner)

    def forward(self, state_BSD: Tensor, length_B: Tensor | None = None, regions: Regions | None = None) -> Tensor:
        """Returns unit vectors [B E]. `length_B`: number of real states in each row; None means all. `regions`: the regions of
        the batch, for a head without a grid of its own."""
        x = self.summary(state_BSD, length_B, regions)
        if self.hidden is None:
            return unit(self.out(x))
        y = self.out(self.drop(self.activation(self.hidden(x))))
        return unit(y if self.skip is None else y + self.skip(x))

    def summary(self, state_BSD: Tensor, length_B: Tensor | None = None, regions: Regions | None = None) -> Tensor:
        """Returns the pooled states, which are the input of the projection: [B D]."""
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

    @property
    def condenses(self) -> bool:
        """Whether fewer states than the encoder's are enough to compute the same vector."""
        plain = self.regions is None and not self.blocks and self.attention is None
        return plain and (self.pool in ("first", "last", "end") or isinstance(self.norm, nn.Identity))

    def condensed(self, state_BSD: Tensor, length_B: Tensor | None = None) -> Tensor:
        """For a head that `condenses`: returns the fewest states that give the same vector. This is one state, [B 1 D], or two
        if the head leaves out the first one. All of them are real."""
        seen_BS = (
            None if length_B is None else torch.arange(state_BSD.shape[1], device=length_B.device) < length_B[:, None]
        )
        x_B1D = self.pooled(state_BSD, seen_BS)[:, None]
        return torch.cat([state_BSD[:, :1], x_B1D], 1) if self.pool == "patches" else x_B1D

    def pooled(self, state_BSD: Tensor, seen_BS: Tensor | None) -> Tensor:
        """Pools all states to one vector -> [B D]. `seen_BS`: True for states that are not padding; None means all."""
        if self.attention is not None:
            return self.attention(state_BSD, seen_BS)
        if self.pool == "end":
            return state_BSD[:, -1]
        if self.pool == "first":
            return state_BSD[:, 0]
        if seen_BS is None:
            seen_BS = torch.ones(state_BSD.shape[:2], dtype=torch.bool, device=state_BSD.device)
        if self.pool == "last":
            return state_BSD[torch.arange(state_BSD.shape[0], device=state_BSD.device), seen_BS.sum(1) - 1]
        if self.pool == "patches":
            seen_BS = seen_BS & (torch.arange(state_BSD.shape[1], device=state_BSD.device) > 0)
        weight = seen_BS / seen_BS.sum(1, keepdim=True).clamp(min=1)
        return (state_BSD * weight[..., None].to(state_BSD.dtype)).sum(1)


def unit(x: Tensor) -> Tensor:
    """Scales vectors to length one, in fp32 at least. FLIP's 1e-8 is added to the length, so that a vector of zeros stays
    finite."""
    x = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
    return x / (x.norm(dim=-1, keepdim=True) + 1e-8)


class Embed(nn.Module):
    """The heads of a joint space, and how it reads a text."""

    def __init__(self, config: EmbedConfig, image: ImageEncoderConfig, text_width: int):
        super().__init__()
        self.config = config
        self.image = Head(config.image, image.width, config.width, image)
        self.text = Head(config.text, text_width, config.width)

    def words(self, ids_BL: Tensor, length_B: Tensor, text: TextEncoderConfig) -> tuple[Tensor, Tensor]:
        """Returns the ids that the text encoder reads, and the number of real ones in each row. A text without words keeps one
        position."""
        config, ids, length = self.config, ids_BL, length_B
        if not config.text_special:
            last = torch.arange(ids.shape[1], device=ids.device) == length[:, None] - 1
            ids, length = ids.masked_fill(last, text.pad)[:, 1:], (length - 2).clamp(min=1)
        elif not config.text_start:
            ids, length = ids[:, 1:], length - 1
        if config.text_length is not None:
            more = config.text_length - ids.shape[1]
            cut_B1 = length[:, None] > config.text_length
            ids, length = F.pad(ids, (0, more), value=text.pad), length.clamp(max=config.text_length)
            position = torch.arange(ids.shape[1], device=ids.device)
            if config.text_pad is not None:
                ids = ids.masked_fill(position >= length[:, None], config.text_pad)
            if config.text_special:
                # A text that is cut still ends with </s>, whose state may be the pooled one.
                ids = ids.masked_fill(cut_B1 & (position == length[:, None] - 1), text.eos)
        return ids, length
