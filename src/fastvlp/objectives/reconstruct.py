"""Reconstruction of the patches that masking dropped, by a small decoder (MAE, arXiv 2111.06377), beside a contrastive loss
(FLIP, arXiv 2212.00794, section 4.1, table 1f)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastvlp.batch import Batch
from fastvlp.config import Count, NotNegative
from fastvlp.data.tokenize import Tokenizer
from fastvlp.errors import UserError
from fastvlp.model.encoders.vit import patchify, resize_positions, sincos_positions
from fastvlp.model.keep import random_keep
from fastvlp.model.layers import LayerConfig, initialise_as_mae, stack
from fastvlp.model.model import ModelConfig, VLModel
from fastvlp.objectives.losses import at_least_fp32
from fastvlp.objectives.objective import Loss, Objective, ObjectiveConfig, constant


@dataclass(frozen=True, kw_only=True)
class ReconstructConfig(ObjectiveConfig):
    """Predict the pixels of the dropped patches. The decoder's size is that of MAE, and the weight of 1 is our choice: FLIP
    states neither."""

    depth: Count = 8
    """Number of layers of the decoder."""
    width: Count = 512
    """Width of the decoder."""
    heads: Count = 16
    """Number of attention heads of the decoder."""
    weight: NotNegative = 1.0
    """Weight of the loss, relative to the losses of other objectives."""

    def __post_init__(self) -> None:
        if self.width % 4 or self.width % self.heads:
            raise ValueError(f"`width` {self.width} must divide into {self.heads} heads and, for its positions, by 4")

    def build(self, model: ModelConfig, tokenizer: Tokenizer) -> Reconstruct:
        if model.single is not None:
            raise UserError("reconstruction needs an image encoder over patches, but a single stream reads regions")
        model.image.check_can_drop()
        return Reconstruct(self, model)


def dropped_patches(keep_BK: Tensor, patches: int) -> Tensor:
    """Sorted indices [B N-K] of the patches that are not kept."""
    dropped_BN = torch.ones(len(keep_BK), patches, device=keep_BK.device).scatter(1, keep_BK, 0)
    return dropped_BN.argsort(dim=1, descending=True, stable=True)[:, : patches - keep_BK.shape[1]]


def pick(x_BND: Tensor, index_BM: Tensor) -> Tensor:
    """The rows of each sample at these places -> [B M D]."""
    return x_BND.gather(1, index_BM[..., None].expand(-1, -1, x_BND.shape[-1]))


def normalised(pixels_BMC: Tensor) -> Tensor:
    """Normalises each patch to mean 0 and variance 1 (MAE, section 4.1; the variance as in its released code)."""
    variance, mean = torch.var_mean(pixels_BMC, -1, keepdim=True)
    return (pixels_BMC - mean) / (variance + 1e-6).sqrt()


class Reconstruct(Objective):
    """The loss of an image is the mean over its dropped patches; the count is that of the images."""

    position: Tensor
    image_use = "pixels"

    def __init__(self, config: ReconstructConfig, model: ModelConfig):
        super().__init__()
        image, width = model.image, config.width
        layer = LayerConfig(width=width, heads=config.heads, hidden=4 * width)
        self.config = config
        self.enter = nn.Linear(image.width, width)
        self.hidden = nn.Parameter(torch.empty(width))
        self.register_buffer("position", sincos_positions(image.grid, width), persistent=False)
        self.blocks = stack(layer, config.depth)
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, 3 * (image.size // image.grid) ** 2)
        initialise_as_mae(self)

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        return {"pixels": constant(len(batch), batch.length)}

    def forward(self, model: VLModel, image_BKD: Tensor, batch: Batch) -> dict[str, Loss]:
        first, patch = model.config.image.prefix, model.config.image.size // model.config.image.grid
        # Images may be smaller at the beginning of a run.
        grid = batch.image.shape[-1] // patch
        N, position_ND = grid**2, resize_positions(self.position, grid, 0)
        K = image_BKD.shape[1] - first
        if K == N:
            raise UserError("reconstruction predicts dropped patches, but none are dropped; set `keep` below 1")
        keep_BK = random_keep(batch.seed, N, K / N)
        dropped_BM = dropped_patches(keep_BK, N)
        x = self.enter(image_BKD)
        hidden_BND = self.hidden.to(x.dtype).expand(len(x), N, -1)
        patch_BND = hidden_BND.scatter(1, keep_BK[..., None].expand(-1, -1, x.shape[-1]), x[:, first:])
        x = torch.cat([x[:, :first], patch_BND + position_ND], 1)
        for block in self.blocks:
            x = block(x)
        pixels_BMC = at_least_fp32(self.out(self.norm(pick(x[:, first:], dropped_BM))))
        pixels_BNC = patchify(model.image.normalised(batch.image), patch)
        target_BMC = normalised(pick(pixels_BNC, dropped_BM))
        error_B = (pixels_BMC - target_BMC).square().mean((1, 2))
        return {"pixels": Loss(error_B.sum(), self.counts(batch)["pixels"], self.config.weight)}
