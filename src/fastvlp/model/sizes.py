"""Model sizes: functions that return a ModelConfig, in which only the vocabulary is still to be set (`with_tokenizer`).

Functions without required arguments can be named on the command line (`model/named_sizes.py`). The others build parts.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Literal, NamedTuple

from fastvlp.errors import UserError
from fastvlp.model.encoders.efficientnet_shapes import efficientnet
from fastvlp.model.encoders.text_transformer import TextTransformerConfig
from fastvlp.model.encoders.transformers_image import TransformersImageConfig
from fastvlp.model.encoders.vit import ViTConfig
from fastvlp.model.fusion import FusionConfig, ReconstructorConfig
from fastvlp.model.joint_space import EmbedConfig, HeadConfig
from fastvlp.model.layers import Activation, LayerConfig, Norm
from fastvlp.model.model import ModelConfig
from fastvlp.model.region_embedding import RegionConfig
from fastvlp.model.region_pooling import Place, RegionPool
from fastvlp.model.single_stream import SingleConfig

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


class Tower(NamedTuple):
    """Shape of a transformer encoder whose MLP is four times as wide as its states."""

    depth: int
    width: int
    heads: int

    def layer(self, activation: Activation, eps: float) -> LayerConfig:
        return LayerConfig(width=self.width, heads=self.heads, hidden=4 * self.width, eps=eps, activation=activation)


def flip(image: Tower, text: Tower, *, width: int, size: int, patch: int, length: int = 32) -> ModelConfig:
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


def flip_b16(*, size: int = 224) -> ModelConfig:
    """FLIP ViT-B/16 (arXiv 2212.00794, Table 9)."""
    return flip(Tower(12, 768, 12), Tower(12, 512, 8), width=512, size=size, patch=16)


def flip_l16(*, size: int = 224) -> ModelConfig:
    """FLIP ViT-L/16 (arXiv 2212.00794, Table 9)."""
    return flip(Tower(24, 1024, 16), Tower(12, 768, 12), width=768, size=size, patch=16)


def flip_h14(*, size: int = 224) -> ModelConfig:
    """FLIP ViT-H/14 (arXiv 2212.00794, Table 9)."""
    return flip(Tower(32, 1280, 16), Tower(24, 1024, 16), width=1024, size=size, patch=14)


def flip_tiny(*, size: int = 48) -> ModelConfig:
    """FLIP in the size of `tiny`; its text encoder has as many layers as the text encoder and fusion of `tiny` together."""
    return flip(Tower(4, 96, 3), Tower(3, 96, 3), width=128, size=size, patch=8)


def flip_small(*, size: int = 112, length: int = 32) -> ModelConfig:
    """FLIP in the size of `small`; its text encoder has as many layers as the text encoder and fusion of `small` together."""
    return flip(Tower(6, 192, 6), Tower(4, 192, 6), width=256, size=size, patch=16, length=length)


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
    return clip(Tower(12, 768, 12), Tower(12, 512, 8), width=512, size=size, patch=32)


def clip_b16(*, size: int = 224) -> ModelConfig:
    """CLIP ViT-B/16 (arXiv 2103.00020, Table 20)."""
    return clip(Tower(12, 768, 12), Tower(12, 512, 8), width=512, size=size, patch=16)


def clip_l14(*, size: int = 224) -> ModelConfig:
    """CLIP ViT-L/14 (arXiv 2103.00020, Table 20)."""
    return clip(Tower(24, 1024, 16), Tower(12, 768, 12), width=768, size=size, patch=14)


def clip_small(*, size: int = 112) -> ModelConfig:
    """CLIP with encoders of the sizes in `flip_small`."""
    return clip(Tower(6, 192, 6), Tower(4, 192, 6), width=256, size=size, patch=16, positions=64, activation="gelu")


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
