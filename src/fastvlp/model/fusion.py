"""Parts in which a text attends to an image: fusion layers, the reconstructor and the vocabulary head (FLM, arXiv 2303.14038,
section 3)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvlp.model.layers import LayerConfig, initialise, stack


@dataclass(frozen=True, kw_only=True)
class FusionConfig:
    """Fusion layers, in which a text attends to an image."""

    depth: int
    """Number of layers."""
    layer: LayerConfig
    """Shape of each layer; its width must equal the text encoder's."""
    slots: int = 2
    """Largest number of images of an item. Each has its own type vector (NLVR2: 2)."""
    image_depth: int = 0
    """Number of self-attention layers over the states of an image, before texts attend to them (FLIP's captioner: 3)."""


@dataclass(frozen=True, kw_only=True)
class ReconstructorConfig:
    """FLM's reconstructor: layers that predict a hidden word from the states of both streams, which read the text before and
    after it."""

    bottom: int
    """Number of layers that attend to the states of the text encoder's last layers."""
    top: int
    """Number of layers that attend to the states of the last fusion layers."""
    layer: LayerConfig
    """Shape of each layer; its width must equal the text encoder's."""


class Fusion(nn.Module):
    """Layers of self-attention over the text, cross-attention to the image, and an MLP. The states of the image are not
    updated, except by layers of their own before the first of these layers."""

    def __init__(self, config: FusionConfig, image_width: int):
        super().__init__()
        width = config.layer.width
        self.text_in = nn.Linear(width, width)
        self.image_in = nn.Linear(image_width, width)
        self.text_type = nn.Parameter(torch.empty(width))
        self.image_type = nn.Parameter(torch.empty(config.slots, width))
        self.image_blocks = stack(config.layer, config.image_depth)
        self.blocks = stack(config.layer, config.depth, cross=True)
        pre = config.layer.norm == "pre"
        self.image_norm = nn.LayerNorm(width, eps=config.layer.eps) if pre and config.image_depth else nn.Identity()
        self.norm = nn.LayerNorm(width, eps=config.layer.eps) if pre else nn.Identity()
        initialise(self, width)

    def image_memory(self, image_BKD: Tensor, slot_B: Tensor | None) -> Tensor:
        """Returns the image states to which cross-attention attends [B K D]. `slot_B`: which image of its item it is; None
        means the first."""
        image_type = self.image_type[0] if slot_B is None else self.image_type[slot_B][:, None]
        x = self.image_in(image_BKD) + image_type
        for block in self.image_blocks:
            x = block(x)
        return self.image_norm(x)


class Reconstructor(nn.Module):
    """Layers in which queries attend only to both streams. There is no self-attention, and no attention to the image itself."""

    def __init__(self, config: ReconstructorConfig):
        super().__init__()
        width, pre = config.layer.width, config.layer.norm == "pre"
        norm = lambda: nn.LayerNorm(width, eps=config.layer.eps) if pre else nn.Identity()  # noqa: E731
        self.reverse_type = nn.Parameter(torch.empty(width))
        self.query_type = nn.Parameter(torch.empty(width))
        self.bottom = stack(config.layer, config.bottom, attend=False, cross=True)
        self.top = stack(config.layer, config.top, attend=False, cross=True)
        # The states of pre-norm layers are sums that are not normalised, so their keys get a norm of their own.
        self.bottom_key_norm = nn.ModuleList(norm() for _ in range(config.bottom))
        self.top_key_norm = nn.ModuleList(norm() for _ in range(config.top))
        self.norm = norm()
        initialise(self, width)


class LMHead(nn.Module):
    """The vocabulary head: Linear, GELU, LayerNorm, and then the matrix of the vocabulary, which is not tied to the word
    embedding."""

    def __init__(self, width: int, vocab: int, eps: float):
        super().__init__()
        self.transform = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=eps)
        self.vocabulary = nn.Linear(width, vocab)
        initialise(self, width)

    def hidden(self, x: Tensor) -> Tensor:
        """Returns the states that are multiplied with the vocabulary: [... D] -> [... D]."""
        return self.norm(F.gelu(self.transform(x)))

    def forward(self, x: Tensor) -> Tensor:
        """Returns the logits [... V] of states [... D]."""
        return self.vocabulary(self.hidden(x))
