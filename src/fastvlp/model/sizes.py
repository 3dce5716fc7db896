"""Model sizes: functions that return a ModelConfig, in which only the vocabulary is still to be set (`with_tokenizer`).

Functions without required arguments can be named on the command line (`model/named_sizes.py`). The others build parts. Two
towers in the shapes of CLIP and FLIP are written in `tower_sizes.py`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from fastvlp.errors import UserError
from fastvlp.model.encoders.efficientnet_shapes import efficientnet
from fastvlp.model.encoders.text_transformer import TextTransformerConfig
from fastvlp.model.encoders.transformers_image import TransformersImageConfig
from fastvlp.model.encoders.vit import ViTConfig
from fastvlp.model.fusion import FusionConfig, ReconstructorConfig
from fastvlp.model.joint_space import EmbedConfig, HeadConfig
from fastvlp.model.layers import LayerConfig, Norm
from fastvlp.model.model import ModelConfig
from fastvlp.model.region_embedding import RegionConfig
from fastvlp.model.region_pooling import Place, RegionPool
from fastvlp.model.single_stream import SingleConfig
from fastvlp.model.tower_sizes import Tower as Tower
from fastvlp.model.tower_sizes import clip as clip
from fastvlp.model.tower_sizes import clip_b16 as clip_b16
from fastvlp.model.tower_sizes import clip_b32 as clip_b32
from fastvlp.model.tower_sizes import clip_l14 as clip_l14
from fastvlp.model.tower_sizes import clip_small as clip_small
from fastvlp.model.tower_sizes import flip as flip
from fastvlp.model.tower_sizes import flip_b16 as flip_b16
from fastvlp.model.tower_sizes import flip_b16_published as flip_b16_published
from fastvlp.model.tower_sizes import flip_h14 as flip_h14
from fastvlp.model.tower_sizes import flip_h14_published as flip_h14_published
from fastvlp.model.tower_sizes import flip_l16 as flip_l16
from fastvlp.model.tower_sizes import flip_l16_published as flip_l16_published
from fastvlp.model.tower_sizes import flip_published as flip_published
from fastvlp.model.tower_sizes import flip_small as flip_small
from fastvlp.model.tower_sizes import flip_small_published as flip_small_published
from fastvlp.model.tower_sizes import flip_tiny as flip_tiny
from fastvlp.model.tower_sizes import flip_tiny_published as flip_tiny_published

if TYPE_CHECKING:
    from fastvlp.data.tokenize import Tokenizer


def with_tokenizer(config: ModelConfig, tokenizer: Tokenizer) -> ModelConfig:
    """Returns the config with the vocabulary size and the special ids of a tokenizer."""
    text = replace(
        config.text,
        vocab=tokenizer.vocab_size,
        pad=tokenizer.pad,
        bos=tokenizer.bos,
        eos=tokenizer.eos,
        mask=tokenizer.mask,
    )
    return replace(config, text=text)


def fusion_model(
    *,
    width: int,
    depths: tuple[int, int, int],
    size: int,
    patch: int,
    positions: int,
    norm: Norm,
    reconstructor: bool,
    dropout: float = 0.0,
) -> ModelConfig:
    """Returns an image encoder, a text encoder and fusion layers of one width. `depths` are their numbers of layers, in this
    order. The reconstructor has as many layers as text encoder and fusion together."""
    image_depth, text_depth, fusion_depth = depths
    heads = max(1, width // 64) if width >= 256 else width // 32
    tower = LayerConfig(width=width, heads=heads, hidden=4 * width, dropout=dropout)
    layer = LayerConfig(width=width, heads=heads, hidden=4 * width, norm=norm, dropout=dropout)
    return ModelConfig(
        image=ViTConfig(size=size, patch=patch, depth=image_depth, layer=tower),
        text=TextTransformerConfig(
            positions=positions,
            depth=text_depth,
            layer=layer,
        ),
        fusion=FusionConfig(depth=fusion_depth, layer=layer),
        reconstructor=ReconstructorConfig(bottom=text_depth, top=fusion_depth, layer=layer) if reconstructor else None,
    )


def two_towers(config: ModelConfig, *, width: int = 256) -> ModelConfig:
    """Returns the model without its fusion layers, and with a joint space of `width` dimensions."""
    return replace(config, fusion=None, reconstructor=None, embed=joint_space(config, width=width))


def joint_space(config: ModelConfig, *, width: int = 256) -> EmbedConfig:
    """Returns a joint space for a model's encoders. A text is encoded left to right and pooled at </s>, as in CLIP; FLM's
    forward stream encodes it in the same way. An image is pooled by the mean of its states, which works for any number of
    patches."""
    text = HeadConfig(pool="last", norm=not config.text.final_norm, eps=config.text.norm_eps)
    return EmbedConfig(width=width, image=HeadConfig(pool="mean"), text=text)


def region_heads(
    config: ModelConfig, *, width: int, layer: LayerConfig, depth: int, grid: int | None, place: Place = "exact"
) -> EmbedConfig:
    """Returns a joint space with BriVL's heads (arXiv 2103.06561; BAAI-WuDao/BriVL bb8d95b) for a model's encoders.

    Each head has `depth` layers of self-attention over regions of the image or over words, takes the mean of the states, and
    applies two linear layers. Regions are the batch's boxes or, with `grid`, the cells of a grid. `layer` is the shape of the
    layers over regions; the layers over words have the text encoder's width.
    """
    return EmbedConfig(
        width=width,
        image=HeadConfig(
            pool="mean", hidden=width, bias=True, regions=RegionPool(grid=grid, place=place), depth=depth, layer=layer
        ),
        text=HeadConfig(
            pool="mean",
            norm=not config.text.final_norm,
            eps=config.text.norm_eps,
            hidden=width,
            bias=True,
            depth=depth,
            layer=replace(layer, width=config.text.width),
        ),
        # Words do not attend to padding. In the released code they do, so a text's vector depends on the padded length.
        text_mask="full",
    )


def brivl(*, version: Literal[1, 2] = 1, dropout: float = 0.1) -> ModelConfig:
    """BriVL 1.0 (boxes of a detector and the whole image) or 2 (a 6x6 grid and the whole image), in the released size.

    An EfficientNet-B5 of transformers, whose map has 12x12 cells at 380 pixels (1.0) and 15x15 at 456 (2), and a text encoder
    of BERT-base's shape; 4x4 sample points in a region; 4 layers with 4 heads, 2048 wide over regions and 768 wide over words;
    a joint space of 2048 dimensions. Other than released, samples lie within their box, batch norms keep the statistics that
    they start with, and BERT does not attend to padding.
    """
    size = 380 if version == 1 else 456
    bert = LayerConfig(width=768, heads=12, hidden=3072, norm="post", eps=1e-12, dropout=dropout)
    config = ModelConfig(
        image=TransformersImageConfig(
            size=size,
            mean=(0.485, 0.456, 0.406),
            std=(0.229, 0.224, 0.225),
            architecture=efficientnet("b5", size),
        ),
        text=TextTransformerConfig(positions=512, depth=12, layer=bert, embed_eps=1e-12),
    )
    layer = LayerConfig(width=2048, heads=4, hidden=2048, norm="post", activation="relu", dropout=dropout)
    grid = None if version == 1 else 6
    return replace(config, embed=region_heads(config, width=2048, layer=layer, depth=4, grid=grid))


def brivl_tiny(*, size: int = 48, grid: int | None = None) -> ModelConfig:
    """BriVL with as many layers as `flip_tiny`; the last layer for texts is in the joint space's head."""
    return _with_region_heads(tiny(size=size), text_depth=2, width=128, grid=grid)


def brivl_small(*, size: int = 112, grid: int | None = 6) -> ModelConfig:
    """BriVL with as many layers as `flip_small`; the last layer for texts is in the joint space's head."""
    return _with_region_heads(small(size=size), text_depth=3, width=256, grid=grid)


def _with_region_heads(config: ModelConfig, *, text_depth: int, width: int, grid: int | None) -> ModelConfig:
    assert config.fusion is not None
    own = config.fusion.layer
    layer = LayerConfig(width=own.width, heads=own.heads, hidden=2 * own.width, norm="post", activation="relu")
    return replace(
        config,
        text=config.text.with_depth(text_depth),
        fusion=None,
        reconstructor=None,
        embed=region_heads(config, width=width, layer=layer, depth=1, grid=grid),
    )


def tiny(*, size: int = 48, patch: int = 8, norm: Norm = "pre", reconstructor: bool = True) -> ModelConfig:
    """A model to train for a few minutes on two CPU cores: width 96; 4 layers for images, 1 for texts and 2 for fusion. Most of
    the computation is in the image encoder, as in FLM's paper, so a step of FLM costs about 1.5 steps of AR."""
    return fusion_model(
        width=96,
        depths=(4, 1, 2),
        size=size,
        patch=patch,
        positions=64,
        norm=norm,
        reconstructor=reconstructor,
    )


def small(*, size: int = 112, patch: int = 16, norm: Norm = "pre", reconstructor: bool = True) -> ModelConfig:
    """A model to train on photographs on a few CPU cores: width 192; 6 layers for images, 2 for texts and 2 for fusion."""
    return fusion_model(
        width=192,
        depths=(6, 2, 2),
        size=size,
        patch=patch,
        positions=64,
        norm=norm,
        reconstructor=reconstructor,
    )


def flm_base(*, size: int = 288, reconstructor: bool = True, dropout: float = 0.1) -> ModelConfig:
    """FLM as published (arXiv 2303.14038; TencentARC/FLM): CLIP ViT-B/32 without its last layer, RoBERTa-base's embeddings and
    first 6 layers, 6 fusion layers, and a reconstructor of 6+6 layers; post-norm."""
    vit = LayerConfig(width=768, heads=12, hidden=3072, activation="quick_gelu")
    roberta = LayerConfig(width=768, heads=12, hidden=3072, norm="post", eps=1e-5, dropout=dropout)
    cross = LayerConfig(width=768, heads=12, hidden=3072, norm="post", eps=1e-12, dropout=dropout)
    return ModelConfig(
        image=ViTConfig(size=size, patch=32, depth=11, layer=vit, embed_norm=True, patch_bias=False),
        text=TextTransformerConfig(
            positions=512,
            depth=6,
            layer=roberta,
            position_offset=2,
            pad_position=1,
        ),
        fusion=FusionConfig(depth=6, layer=cross),
        reconstructor=ReconstructorConfig(bottom=6, top=6, layer=cross) if reconstructor else None,
    )


def single_stream_model(
    *, width: int, depth: int, regions: RegionConfig, positions: int, size: int, norm: Norm, dropout: float
) -> ModelConfig:
    """Returns a single stream over words and regions. It has no image encoder: only `size` is used of that config."""
    heads = max(1, width // 64) if width >= 256 else width // 32
    layer = LayerConfig(width=width, heads=heads, hidden=4 * width, norm=norm, eps=1e-12, dropout=dropout)
    return ModelConfig(
        image=ViTConfig(size=size, patch=size, depth=0, layer=layer),
        text=TextTransformerConfig(positions=positions, depth=0, layer=layer, embed_eps=1e-12),
        single=SingleConfig(depth=depth, layer=layer, regions=regions),
    )


def single_over_patches(config: ModelConfig, *, pool: int = 2) -> ModelConfig:
    """Turns a model with fusion layers into a single stream over words and regions, which are pooled from the states of its
    image encoder. The stream has as many layers as the text encoder and fusion together."""
    if config.fusion is None:
        raise UserError(
            "a single stream takes its layers from fusion, and this model has no fusion layers; use tiny or small"
        )
    return ModelConfig(
        image=config.image,
        text=config.text.with_depth(0),
        single=SingleConfig(
            depth=config.text.depth + config.fusion.depth,
            layer=config.fusion.layer,
            regions=RegionConfig(feature=config.image.width, pool=pool),
        ),
    )


def tiny_single(*, size: int = 48, crop: int = 8, feature: int | None = None, norm: Norm = "pre") -> ModelConfig:
    """A single stream to train for a few minutes on two CPU cores: width 96, 4 layers. A region is a detector's vector of
    `feature` dimensions or, if that is None, its pixels sampled at `crop` x `crop` points."""
    regions = RegionConfig(crop=crop) if feature is None else RegionConfig(feature=feature)
    return single_stream_model(width=96, depth=4, regions=regions, positions=64, size=size, norm=norm, dropout=0.0)


def uniter_base(*, dropout: float = 0.1) -> ModelConfig:
    """UNITER-base (arXiv 1909.11740; ChenRocks/UNITER config): BERT-base over words and a detector's 2048-d regions."""
    return uniter(width=768, depth=12, dropout=dropout)


def uniter_large(*, dropout: float = 0.1) -> ModelConfig:
    """UNITER-large (arXiv 1909.11740): BERT-large over words and a detector's 2048-d regions."""
    return uniter(width=1024, depth=24, dropout=dropout)


def uniter(*, width: int, depth: int, feature: int = 2048, dropout: float = 0.1) -> ModelConfig:
    """UNITER of any size: BERT over words and a detector's regions, each a vector of `feature` dimensions."""
    regions = RegionConfig(feature=feature)
    return single_stream_model(
        width=width, depth=depth, regions=regions, positions=512, size=224, norm="post", dropout=dropout
    )
