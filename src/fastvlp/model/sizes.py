"""Model sizes: functions that return a ModelConfig, complete but for the vocabulary (`with_tokenizer`)."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from fastvlp.model.embed import EmbedConfig, HeadConfig
from fastvlp.model.fusion import FusionConfig, ReconstructorConfig
from fastvlp.model.image import ImageConfig
from fastvlp.model.layers import LayerConfig, Norm
from fastvlp.model.model import ModelConfig
from fastvlp.model.regions import RegionConfig
from fastvlp.model.single import SingleConfig
from fastvlp.model.text import TextConfig

if TYPE_CHECKING:
    from fastvlp.data.tokenize import Tokenizer


def with_tokenizer(config: ModelConfig, tokenizer: Tokenizer) -> ModelConfig:
    """The same model over this tokenizer's vocabulary and special ids."""
    text = replace(
        config.text,
        vocab=tokenizer.vocab_size,
        pad=tokenizer.pad,
        bos=tokenizer.bos,
        eos=tokenizer.eos,
        mask=tokenizer.mask,
    )
    return replace(config, text=text)


def _equal_width(
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
    """Towers of one width; `depths` of image, text, fusion; the reconstructor has one layer for each text layer."""
    image_depth, text_depth, fusion_depth = depths
    heads = max(1, width // 64) if width >= 256 else width // 32
    tower = LayerConfig(width=width, heads=heads, hidden=4 * width, dropout=dropout)
    layer = LayerConfig(width=width, heads=heads, hidden=4 * width, norm=norm, dropout=dropout)
    return ModelConfig(
        image=ImageConfig(size=size, patch=patch, depth=image_depth, layer=tower),
        text=TextConfig(
            positions=positions,
            depth=text_depth,
            layer=layer,
        ),
        fusion=FusionConfig(depth=fusion_depth, layer=layer),
        reconstructor=ReconstructorConfig(bottom=text_depth, top=fusion_depth, layer=layer) if reconstructor else None,
    )


def two_towers(config: ModelConfig, *, width: int = 256) -> ModelConfig:
    """The image and text towers of a size alone, embedded in a joint space."""
    return replace(config, fusion=None, reconstructor=None, embed=joint_space(config, width=width))


def joint_space(config: ModelConfig, *, width: int = 256) -> EmbedConfig:
    """CLIP's text side (causal, pooled at </s>, which FLM's forward stream shares) beside a mean of image states, which
    takes any share of the patches."""
    layer = config.text.layer
    text = HeadConfig(pool="last", norm=layer.norm == "pre", eps=layer.eps)
    return EmbedConfig(width=width, image=HeadConfig(pool="mean"), text=text)


def tiny(*, size: int = 48, patch: int = 8, norm: Norm = "pre", reconstructor: bool = True) -> ModelConfig:
    """For a few minutes on two CPU cores: width 96, 4+1+2 layers; as in the paper's size the image tower carries most of
    the work, so that an FLM step costs about 1.5 AR steps."""
    return _equal_width(
        width=96,
        depths=(4, 1, 2),
        size=size,
        patch=patch,
        positions=64,
        norm=norm,
        reconstructor=reconstructor,
    )


def small(*, size: int = 112, patch: int = 16, norm: Norm = "pre", reconstructor: bool = True) -> ModelConfig:
    """For photographs on a few CPU cores: width 192, 6+2+2 layers; the image tower carries most of the work."""
    return _equal_width(
        width=192,
        depths=(6, 2, 2),
        size=size,
        patch=patch,
        positions=64,
        norm=norm,
        reconstructor=reconstructor,
    )


def flm_base(*, size: int = 288, reconstructor: bool = True, dropout: float = 0.1) -> ModelConfig:
    """The paper's size (arXiv 2303.14038; TencentARC/FLM): CLIP ViT-B/32 less its last block, RoBERTa-base embeddings
    and first 6 layers, 6 fusion layers, a 6+6 reconstructor; post-norm, 50 tokens."""
    vit = LayerConfig(width=768, heads=12, hidden=3072, activation="quick_gelu")
    roberta = LayerConfig(width=768, heads=12, hidden=3072, norm="post", eps=1e-5, dropout=dropout)
    cross = LayerConfig(width=768, heads=12, hidden=3072, norm="post", eps=1e-12, dropout=dropout)
    return ModelConfig(
        image=ImageConfig(size=size, patch=32, depth=11, layer=vit, embed_norm=True, patch_bias=False),
        text=TextConfig(
            positions=512,
            depth=6,
            layer=roberta,
            position_offset=2,
            pad_position=1,
        ),
        fusion=FusionConfig(depth=6, layer=cross),
        reconstructor=ReconstructorConfig(bottom=6, top=6, layer=cross) if reconstructor else None,
    )


def _single(
    *, width: int, depth: int, regions: RegionConfig, positions: int, size: int, norm: Norm, dropout: float
) -> ModelConfig:
    """One stream over words and regions; of the image only `size` is read."""
    heads = max(1, width // 64) if width >= 256 else width // 32
    layer = LayerConfig(width=width, heads=heads, hidden=4 * width, norm=norm, eps=1e-12, dropout=dropout)
    return ModelConfig(
        image=ImageConfig(size=size, patch=size, depth=0, layer=layer),
        text=TextConfig(positions=positions, depth=0, layer=layer, embed_eps=1e-12),
        single=SingleConfig(depth=depth, layer=layer, regions=regions),
    )


def tiny_single(*, size: int = 48, crop: int = 8, norm: Norm = "pre") -> ModelConfig:
    """For a few minutes on two CPU cores: width 96, 4 layers over words and the regions' own pixels."""
    regions = RegionConfig(crop=crop)
    return _single(width=96, depth=4, regions=regions, positions=64, size=size, norm=norm, dropout=0.0)


def uniter_base(*, dropout: float = 0.1) -> ModelConfig:
    """UNITER-base (arXiv 1909.11740; ChenRocks/UNITER config): BERT-base over words and a detector's 2048-d regions."""
    return _uniter(width=768, depth=12, dropout=dropout)


def uniter_large(*, dropout: float = 0.1) -> ModelConfig:
    """UNITER-large: BERT-large likewise."""
    return _uniter(width=1024, depth=24, dropout=dropout)


def _uniter(*, width: int, depth: int, dropout: float) -> ModelConfig:
    regions = RegionConfig(feature=2048)
    return _single(width=width, depth=depth, regions=regions, positions=512, size=224, norm="post", dropout=dropout)
