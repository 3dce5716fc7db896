"""A vision transformer whose patches are embedded only where they are kept (FLIP, arXiv 2212.00794)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvlp.config import Count, Positive
from fastvlp.errors import UserError
from fastvlp.model.encoders.interface import ImageEncoder, ImageEncoderConfig
from fastvlp.model.encoders.layer_names import LayerNames, layers_in
from fastvlp.model.layers import LayerConfig, initialise, stack


@dataclass(frozen=True, kw_only=True)
class ViTConfig(ImageEncoderConfig):
    """A vision transformer (arXiv 2010.11929)."""

    patch: Count
    """Side of a patch, in pixels."""
    depth: int
    """Number of layers."""
    layer: LayerConfig
    """Shape of each layer."""
    class_token: bool = True
    """Whether a learned class token comes before the patches."""
    more_tokens: int = 0
    """Number of further learned tokens after the class token, such as DeiT's distillation token."""
    position: Literal["learned", "sincos"] = "learned"
    """Position embeddings: a learned table, or fixed sines and cosines (sincos), with none for the class token (FLIP)."""
    position_start: Literal["random", "sincos"] = "random"
    """Initial values of a learned position table: random numbers, or the sines and cosines."""
    embed_norm: bool = False
    """Whether a layer norm follows the embedding of patches (CLIP's ln_pre)."""
    patch_bias: bool = True
    """Whether the embedding of patches has a bias (not in CLIP)."""
    norm_eps: Positive = 1e-5
    """Epsilon of the norms before and after the layers."""

    can_drop_patches: ClassVar[bool] = True
    """Dropped patches are removed before they are embedded."""

    @property
    def width(self) -> int:
        return self.layer.width

    @property
    def grid(self) -> int:
        return self.size // self.patch

    @property
    def prefix(self) -> int:
        return int(self.class_token) + self.more_tokens

    def at_size(self, size: int) -> ViTConfig:
        return replace(self, size=size)

    def normal_form(self) -> ViTConfig:
        return replace(self, position_start="random")

    def check(self) -> None:
        if self.patch < 1 or self.size < self.patch or self.size % self.patch:
            raise UserError(
                f"`model.image.size` {self.size} is not a whole number of patches of {self.patch} pixels "
                "(`model.image.patch`)"
            )
        if "sincos" in (self.position, self.position_start) and self.width % 4:
            raise UserError(
                f"`model.image.position` and `position_start`: sincos needs a width that is divisible by 4, and "
                f"{self.width} is not"
            )
        self.layer.check("model.image.layer")

    def build(self) -> ViT:
        return ViT(self)


def patchify(image_BCHW: Tensor, patch: int) -> Tensor:
    """[B 3 H W] -> [B N 3*patch*patch], patches row by row, each channel-major like a convolution's weight."""
    B, C, H, W = image_BCHW.shape
    x = image_BCHW.reshape(B, C, H // patch, patch, W // patch, patch)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(B, -1, C * patch * patch)


def sincos_positions(grid: int, width: int, *, prefix: int = 0) -> Tensor:
    """Fixed positions [prefix + grid**2 width]: quarters of sines and cosines of the column, then of the row, at wavelengths
    up to 2 pi 10000 (MoCo v3, arXiv 2104.02057; MAE, FLIP). The class token's row is zero, and comes first."""
    place = torch.arange(grid, dtype=torch.float64)
    angle_GQ = place[:, None] * 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    wave_GH = torch.cat([angle_GQ.sin(), angle_GQ.cos()], 1)
    table_ND = torch.cat([wave_GH.repeat(grid, 1), wave_GH.repeat_interleave(grid, 0)], 1).float()
    return torch.cat([table_ND.new_zeros(prefix, width), table_ND])


def resize_positions(weight_ND: Tensor, grid: int, prefix: int) -> Tensor:
    """Bicubic resize of learned 2-D positions to another grid; the `prefix` rows of the tokens before the map are kept."""
    head, body = weight_ND[:prefix], weight_ND[prefix:]
    side = round(body.shape[0] ** 0.5)
    if side == grid:
        return weight_ND
    square = body.reshape(1, side, side, -1).permute(0, 3, 1, 2).float()
    resized = F.interpolate(square, size=(grid, grid), mode="bicubic", align_corners=False)
    return torch.cat([head, resized.permute(0, 2, 3, 1).reshape(grid * grid, -1).to(weight_ND.dtype)])


class ViT(ImageEncoder):
    position: Tensor

    def __init__(self, config: ViTConfig):
        super().__init__(config)
        width = config.width
        self.config = config
        self.patch = nn.Linear(3 * config.patch**2, width, bias=config.patch_bias)
        if config.position == "learned":
            self.position = nn.Parameter(torch.empty(config.tokens, width))
        else:
            # Not saved, so that a model of another size makes its own.
            table = sincos_positions(config.grid, width, prefix=config.prefix)
            self.register_buffer("position", table, persistent=False)
        self.class_token = nn.Parameter(torch.empty(width)) if config.class_token else None
        self.more_tokens = nn.Parameter(torch.empty(config.more_tokens, width)) if config.more_tokens else None
        self.embed_norm = nn.LayerNorm(width, eps=config.norm_eps) if config.embed_norm else nn.Identity()
        self.blocks = stack(config.layer, config.depth)
        self.norm = nn.LayerNorm(width, eps=config.norm_eps)
        initialise(self, width)
        self.start_positions()

    def start_positions(self) -> None:
        config = self.config
        if config.position == "learned" and config.position_start == "sincos":
            with torch.no_grad():
                self.position.copy_(sincos_positions(config.grid, config.width, prefix=config.prefix))

    def forward(self, image: Tensor, keep_BK: Tensor | None = None) -> Tensor:
        patches = patchify(self.normalised(image), self.config.patch)
        # Of images of another size, between those that it has (FlexiViT, arXiv 2212.08013, section 3.1).
        grid = image.shape[-1] // self.config.patch
        position_ND = resize_positions(self.position, grid, self.config.prefix)[self.config.prefix :]
        if keep_BK is None:
            x = self.patch(patches) + position_ND
        else:
            x = self.patch(patches.gather(1, keep_BK[..., None].expand(-1, -1, patches.shape[-1])))
            x = x + position_ND[keep_BK]
        prefix = [part.view(-1, x.shape[-1]) for part in (self.class_token, self.more_tokens) if part is not None]
        if prefix:
            first_PD = (torch.cat(prefix) + self.position[: self.config.prefix]).to(x.dtype)
            x = torch.cat([first_PD.expand(x.shape[0], -1, -1), x], 1)
        x = self.embed_norm(x)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def layer_names(self) -> LayerNames:
        return layers_in(self, "blocks")

    def resized(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if "position" not in state:
            return dict(state)
        return {**state, "position": resize_positions(state["position"], self.config.grid, self.config.prefix)}
