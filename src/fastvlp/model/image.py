"""The image tower: a ViT whose patches are embedded only where they are kept (FLIP, arXiv 2212.00794)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvlp.data.random import uniform
from fastvlp.model.layers import LayerConfig, initialise, stack

KEEP_SALT = 101


@dataclass(frozen=True, kw_only=True)
class ImageConfig:
    """`size` and `patch` in pixels. `embed_norm` is CLIP's ln_pre. `mean` and `std` are of pixels scaled to 0..1."""

    size: int
    patch: int
    depth: int
    layer: LayerConfig
    class_token: bool = True
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


def random_keep(seed_B: Tensor, patches: int, share: float) -> Tensor:
    """Indices [B K] of the patches that each row keeps, K = round(patches * share), a function of the row's seed."""
    noise_BN = uniform(seed_B, (patches,), KEEP_SALT)
    return noise_BN.argsort(1)[:, : max(1, round(patches * share))].sort(1).values


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

    def __init__(self, config: ImageConfig):
        super().__init__()
        width = config.layer.width
        self.config = config
        self.patch = nn.Linear(3 * config.patch**2, width, bias=config.patch_bias)
        self.position = nn.Parameter(torch.empty(config.tokens, width))
        self.class_token = nn.Parameter(torch.empty(width)) if config.class_token else None
        self.embed_norm = nn.LayerNorm(width, eps=config.norm_eps) if config.embed_norm else nn.Identity()
        self.blocks = stack(config.layer, config.depth)
        self.norm = nn.LayerNorm(width, eps=config.norm_eps)
        self.register_buffer("mean", torch.tensor(config.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(config.std).view(3, 1, 1), persistent=False)
        initialise(self, width)

    def forward(self, image: Tensor, keep_BK: Tensor | None = None) -> Tensor:
        """uint8 [B 3 H W] (or float, already normalised) -> states [B K(+1) D], the class token first."""
        if image.dtype == torch.uint8:
            image = (image.to(self.mean.dtype) / 255 - self.mean) / self.std
        patches = patchify(image, self.config.patch)
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
