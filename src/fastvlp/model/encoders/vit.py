"""The image tower: a ViT whose patches are embedded only where they are kept (FLIP, arXiv 2212.00794)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvlp.model.layers import LayerConfig, initialise, stack
from fastvlp.random import uniform

KEEP_SALT = 101


@dataclass(frozen=True, kw_only=True)
class ImageConfig:
    """`size` and `patch` in pixels. `embed_norm` is CLIP's ln_pre. `position`: a learned table, or fixed sines and cosines
    with none for the class token (FLIP). `mean` and `std` are of pixels scaled to 0..1."""

    size: int
    patch: int
    depth: int
    layer: LayerConfig
    class_token: bool = True
    position: Literal["learned", "sincos"] = "learned"
    embed_norm: bool = False
    patch_bias: bool = True
    norm_eps: float = 1e-5
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)

    @property
    def grid(self) -> int:
        return self.size // self.patch

    @property
    def tokens(self) -> int:
        return self.grid**2 + int(self.class_token)


def patchify(image_BCHW: Tensor, patch: int) -> Tensor:
    """[B 3 H W] -> [B N 3*patch*patch], patches row by row, each channel-major like a convolution's weight."""
    B, C, H, W = image_BCHW.shape
    x = image_BCHW.reshape(B, C, H // patch, patch, W // patch, patch)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(B, -1, C * patch * patch)


def keep_count(patches: int, share: float) -> int:
    """K: so many whole patches as fit into the share (FLIP's released code), at least one. 100 * 0.29 is 28.999... here."""
    return max(1, int(patches * share + 1e-6))


def random_keep(seed_B: Tensor, patches: int, share: float) -> Tensor:
    """Sorted indices [B K] of the patches that each row keeps, a function of the row's seed."""
    noise_BN = uniform(seed_B, (patches,), KEEP_SALT)
    return noise_BN.argsort(1)[:, : keep_count(patches, share)].sort(1).values


def sincos_positions(grid: int, width: int, *, class_token: bool = False) -> Tensor:
    """Fixed positions [grid**2 (+1) width]: quarters of sines and cosines of the column, then of the row, at wavelengths
    up to 2 pi 10000 (MoCo v3, arXiv 2104.02057; MAE, FLIP). The class token's row is zero, and comes first."""
    place = torch.arange(grid, dtype=torch.float64)
    angle_GQ = place[:, None] * 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    wave_GH = torch.cat([angle_GQ.sin(), angle_GQ.cos()], 1)
    table_ND = torch.cat([wave_GH.repeat(grid, 1), wave_GH.repeat_interleave(grid, 0)], 1).float()
    return torch.cat([table_ND.new_zeros(int(class_token), width), table_ND])


def resize_positions(weight_ND: Tensor, grid: int, class_token: bool) -> Tensor:
    """Bicubic resize of learned 2-D positions to another grid; the class token's row is kept."""
    head, body = weight_ND[: int(class_token)], weight_ND[int(class_token) :]
    side = round(body.shape[0] ** 0.5)
    if side == grid:
        return weight_ND
    square = body.reshape(1, side, side, -1).permute(0, 3, 1, 2).float()
    resized = F.interpolate(square, size=(grid, grid), mode="bicubic", align_corners=False)
    return torch.cat([head, resized.permute(0, 2, 3, 1).reshape(grid * grid, -1).to(weight_ND.dtype)])


class ImageTower(nn.Module):
    mean: Tensor
    std: Tensor
    position: Tensor

    def __init__(self, config: ImageConfig):
        super().__init__()
        width = config.layer.width
        self.config = config
        self.patch = nn.Linear(3 * config.patch**2, width, bias=config.patch_bias)
        if config.position == "learned":
            self.position = nn.Parameter(torch.empty(config.tokens, width))
        else:
            # Not saved, so that a model of another size makes its own.
            table = sincos_positions(config.grid, width, class_token=config.class_token)
            self.register_buffer("position", table, persistent=False)
        self.class_token = nn.Parameter(torch.empty(width)) if config.class_token else None
        self.embed_norm = nn.LayerNorm(width, eps=config.norm_eps) if config.embed_norm else nn.Identity()
        self.blocks = stack(config.layer, config.depth)
        self.norm = nn.LayerNorm(width, eps=config.norm_eps)
        self.register_buffer("mean", torch.tensor(config.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(config.std).view(3, 1, 1), persistent=False)
        initialise(self, width)

    def patches(self, image: Tensor) -> Tensor:
        """uint8 [B 3 H W] (or float, already normalised) -> normalised pixels of each patch [B N 3*patch*patch]."""
        if image.dtype == torch.uint8:
            image = (image.to(self.mean.dtype) / 255 - self.mean) / self.std
        return patchify(image, self.config.patch)

    def forward(self, image: Tensor, keep_BK: Tensor | None = None) -> Tensor:
        """uint8 [B 3 H W] (or float, already normalised) -> states [B K(+1) D], the class token first."""
        patches = self.patches(image)
        position_ND = self.position[int(self.config.class_token) :]
        if keep_BK is None:
            x = self.patch(patches) + position_ND
        else:
            x = self.patch(patches.gather(1, keep_BK[..., None].expand(-1, -1, patches.shape[-1])))
            x = x + position_ND[keep_BK]
        if self.class_token is not None:
            first = (self.class_token + self.position[0]).to(x.dtype)
            x = torch.cat([first.expand(x.shape[0], 1, -1), x], 1)
        x = self.embed_norm(x)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)
