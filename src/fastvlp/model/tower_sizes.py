"""Sizes of two towers, in the shapes of CLIP (arXiv 2103.00020) and of FLIP as released (2212.00794)."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from fastvlp.model.encoders.text_transformer import TextTransformerConfig
from fastvlp.model.encoders.vit import ViTConfig
from fastvlp.model.joint_space import EmbedConfig, HeadConfig
from fastvlp.model.layers import Activation, LayerConfig
from fastvlp.model.model import ModelConfig


class Tower(NamedTuple):
    """Shape of a transformer encoder whose MLP is four times as wide as its states."""

    depth: int
    width: int
    heads: int

    def layer(self, activation: Activation, eps: float) -> LayerConfig:
        return LayerConfig(width=self.width, heads=self.heads, hidden=4 * self.width, eps=eps, activation=activation)


# Image and text encoder of each size (arXiv 2103.00020, Table 20; 2212.00794, Table 9), and of ours.
TINY = Tower(4, 96, 3), Tower(3, 96, 3)
SMALL = Tower(6, 192, 6), Tower(4, 192, 6)
BASE = Tower(12, 768, 12), Tower(12, 512, 8)
LARGE = Tower(24, 1024, 16), Tower(12, 768, 12)
HUGE = Tower(32, 1280, 16), Tower(24, 1024, 16)


def flip_published(image: Tower, text: Tower, *, width: int, size: int, patch: int, length: int = 32) -> ModelConfig:
    """FLIP (arXiv 2212.00794, section 3.1) as released (facebookresearch/flip 9bf6bf8).

    Images have fixed sine-cosine positions and are pooled by the mean of all states, including the class token's. Texts have
    no <s> and </s>, are cut or padded to `length`, attend to their padding, and are pooled at the first word.
    """
    return ModelConfig(
        image=ViTConfig(
            size=size,
            patch=patch,
            depth=image.depth,
            layer=image.layer("gelu_tanh", 1e-6),
            position="sincos",
            norm_eps=1e-6,
            mean=(0.485, 0.456, 0.406),
            std=(0.229, 0.224, 0.225),
        ),
        text=TextTransformerConfig(
            positions=length, depth=text.depth, layer=text.layer("gelu_tanh", 1e-6), embed_norm=False, learn_pad=True
        ),
        embed=EmbedConfig(
            width=width,
            image=HeadConfig(pool="mean"),
            text=HeadConfig(pool="first", norm=True, eps=1e-6),
            text_mask="none",
            text_special=False,
            text_length=length,
        ),
        initial="mae",
    )


def flip(image: Tower, text: Tower, *, width: int, size: int, patch: int, positions: int = 77) -> ModelConfig:
    """FLIP's towers in the shape of CLIP, which transformers, sentence-transformers and open_clip load. All weights begin as in
    the released model; positions of patches are learned, from its sines and cosines on."""
    config = clip(image, text, width=width, size=size, patch=patch, positions=positions, activation="gelu")
    assert isinstance(config.image, ViTConfig)
    return replace(config, image=replace(config.image, position_start="sincos"), initial="mae")


def flip_b16(*, size: int = 224) -> ModelConfig:
    """FLIP ViT-B/16 (arXiv 2212.00794, Table 9) in the shape of CLIP."""
    return flip(*BASE, width=512, size=size, patch=16)


def flip_l16(*, size: int = 224) -> ModelConfig:
    """FLIP ViT-L/16 (arXiv 2212.00794, Table 9) in the shape of CLIP."""
    return flip(*LARGE, width=768, size=size, patch=16)


def flip_h14(*, size: int = 224) -> ModelConfig:
    """FLIP ViT-H/14 (arXiv 2212.00794, Table 9) in the shape of CLIP."""
    return flip(*HUGE, width=1024, size=size, patch=14)


def flip_tiny(*, size: int = 48) -> ModelConfig:
    """FLIP in the size of `tiny` and the shape of CLIP; its text encoder has as many layers as text encoder and fusion of
    `tiny` together."""
    return flip(*TINY, width=128, size=size, patch=8, positions=64)


def flip_small(*, size: int = 112) -> ModelConfig:
    """FLIP in the size of `small` and the shape of CLIP; its text encoder has as many layers as text encoder and fusion of
    `small` together."""
    return flip(*SMALL, width=256, size=size, patch=16, positions=64)


def flip_b16_published(*, size: int = 224) -> ModelConfig:
    """FLIP ViT-B/16 (arXiv 2212.00794, Table 9) as released."""
    return flip_published(*BASE, width=512, size=size, patch=16)


def flip_l16_published(*, size: int = 224) -> ModelConfig:
    """FLIP ViT-L/16 (arXiv 2212.00794, Table 9) as released."""
    return flip_published(*LARGE, width=768, size=size, patch=16)


def flip_h14_published(*, size: int = 224) -> ModelConfig:
    """FLIP ViT-H/14 (arXiv 2212.00794, Table 9) as released."""
    return flip_published(*HUGE, width=1024, size=size, patch=14)


def flip_tiny_published(*, size: int = 48) -> ModelConfig:
    """`flip_tiny` in the shape of the released model."""
    return flip_published(*TINY, width=128, size=size, patch=8)


def flip_small_published(*, size: int = 112, length: int = 20) -> ModelConfig:
    """`flip_small` in the shape of the released model; texts have `length` words, as a caption of a photograph has a dozen."""
    return flip_published(*SMALL, width=256, size=size, patch=16, length=length)


def clip(
    image: Tower,
    text: Tower,
    *,
    width: int,
    size: int,
    patch: int,
    positions: int = 77,
    activation: Activation = "quick_gelu",
) -> ModelConfig:
    """CLIP (arXiv 2103.00020, section 2.4). The image is pooled at the class token; the text is encoded left to right and
    pooled at </s>. OpenAI's weights use quick_gelu; open_clip trains with gelu."""
    return ModelConfig(
        image=ViTConfig(
            size=size,
            patch=patch,
            depth=image.depth,
            layer=image.layer(activation, 1e-5),
            embed_norm=True,
            patch_bias=False,
        ),
        text=TextTransformerConfig(
            positions=positions, depth=text.depth, layer=text.layer(activation, 1e-5), embed_norm=False
        ),
        embed=EmbedConfig(width=width, image=HeadConfig(pool="first"), text=HeadConfig(pool="last", norm=True)),
    )


def clip_b32(*, size: int = 224) -> ModelConfig:
    """CLIP ViT-B/32 (arXiv 2103.00020, Table 20)."""
    return clip(*BASE, width=512, size=size, patch=32)


def clip_b16(*, size: int = 224) -> ModelConfig:
    """CLIP ViT-B/16 (arXiv 2103.00020, Table 20)."""
    return clip(*BASE, width=512, size=size, patch=16)


def clip_l14(*, size: int = 224) -> ModelConfig:
    """CLIP ViT-L/14 (arXiv 2103.00020, Table 20)."""
    return clip(*LARGE, width=768, size=size, patch=14)


def clip_small(*, size: int = 112) -> ModelConfig:
    """CLIP with encoders of the sizes in `flip_small`."""
    return clip(*SMALL, width=256, size=size, patch=16, positions=64, activation="gelu")
