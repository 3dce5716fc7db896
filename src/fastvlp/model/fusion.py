"""Text that reads images: fusion layers, the reconstructor, the vocabulary head (FLM, arXiv 2303.14038, section 3)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvlp.model.layers import LayerConfig, initialise, stack


@dataclass(frozen=True, kw_only=True)
class FusionConfig:
    """`slots`: how many images a text may be read beside (2 for NLVR2), each with its own type vector."""

    depth: int
    layer: LayerConfig
    slots: int = 2


@dataclass(frozen=True, kw_only=True)
class ReconstructorConfig:
    """`bottom` layers read the last states of the text tower, `top` layers those of the fusion layers."""

    bottom: int
    top: int
    layer: LayerConfig


class Fusion(nn.Module):
    """Self-attention over the text, cross-attention to the image, MLP. The image's states are not updated."""

    def __init__(self, config: FusionConfig, image_width: int):
        super().__init__()
        width = config.layer.width
        self.text_in = nn.Linear(width, width)
        self.image_in = nn.Linear(image_width, width)
        self.text_type = nn.Parameter(torch.empty(width))
        self.image_type = nn.Parameter(torch.empty(config.slots, width))
        self.blocks = stack(config.layer, config.depth, cross=True)
        pre = config.layer.norm == "pre"
        self.norm = nn.LayerNorm(width, eps=config.layer.eps) if pre else nn.Identity()
        initialise(self, width)

    def image_memory(self, image_BKD: Tensor, slot_B: Tensor | None) -> Tensor:
        kind = self.image_type[0] if slot_B is None else self.image_type[slot_B][:, None]
        return self.image_in(image_BKD) + kind


class Reconstructor(nn.Module):
    """Queries that read both streams and nothing else: no self-attention, no direct sight of the image."""

    def __init__(self, config: ReconstructorConfig):
        super().__init__()
        width, pre = config.layer.width, config.layer.norm == "pre"
        norm = lambda: nn.LayerNorm(width, eps=config.layer.eps) if pre else nn.Identity()  # noqa: E731
        self.reverse_type = nn.Parameter(torch.empty(width))
        self.query_type = nn.Parameter(torch.empty(width))
        self.bottom = stack(config.layer, config.bottom, attend=False, cross=True)
        self.top = stack(config.layer, config.top, attend=False, cross=True)
        # Pre-norm streams hand over unnormalised sums, so their keys get a norm of their own.
        self.bottom_key_norm = nn.ModuleList(norm() for _ in range(config.bottom))
        self.top_key_norm = nn.ModuleList(norm() for _ in range(config.top))
        self.norm = norm()
        initialise(self, width)


class LMHead(nn.Module):
    """Linear, GELU, LayerNorm, then the vocabulary (not tied to the word embedding)."""

    def __init__(self, width: int, vocab: int, eps: float):
        super().__init__()
        self.transform = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=eps)
        self.vocabulary = nn.Linear(width, vocab)
        initialise(self, width)

    def hidden(self, x: Tensor) -> Tensor:
        return self.norm(F.gelu(self.transform(x)))

    def forward(self, x: Tensor) -> Tensor:
        return self.vocabulary(self.hidden(x))
