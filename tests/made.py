"""Small made models and batches that many tests share."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from fastvlp.batch import Batch
from fastvlp.model.encoders.text_transformer import TextTransformerConfig
from fastvlp.model.encoders.vit import ViTConfig
from fastvlp.model.fusion import FusionConfig, ReconstructorConfig
from fastvlp.model.layers import LayerConfig, Norm
from fastvlp.model.model import ModelConfig, VLModel
from fastvlp.model.region_embedding import RegionConfig
from fastvlp.model.sizes import fusion_model, single_stream_model

VOCAB = 40
SPECIALS = {"pad": 0, "bos": 1, "eos": 2, "mask": 3}


def made_tokenizer() -> SimpleNamespace:
    """The part of a Tokenizer that objectives read; every third id continues a word."""
    starts = (torch.arange(VOCAB) % 3 != 0) & (torch.arange(VOCAB) > 3)
    return SimpleNamespace(vocab_size=VOCAB, starts_word=starts, **SPECIALS)


def made_config(
    *,
    width: int = 32,
    depth: int = 2,
    size: int = 16,
    norm: Norm = "pre",
    reconstructor: bool = True,
    separate_heads: bool = False,
) -> ModelConfig:
    layer = LayerConfig(width=width, heads=4, hidden=2 * width, norm=norm)
    tower = LayerConfig(width=width, heads=4, hidden=2 * width)
    return ModelConfig(
        image=ViTConfig(size=size, patch=8, depth=1, layer=tower),
        text=TextTransformerConfig(positions=32, depth=depth, layer=layer, vocab=VOCAB, **SPECIALS),
        fusion=FusionConfig(depth=depth, layer=layer),
        reconstructor=ReconstructorConfig(bottom=depth, top=depth, layer=layer) if reconstructor else None,
        separate_heads=separate_heads,
    )


def small_model(*, size: int = 32, patch: int = 16, reconstructor: bool = True) -> ModelConfig:
    """`tiny` with one layer of width 32 in each part, for tests that train, save and load whole runs."""
    return fusion_model(
        width=32, depths=(1, 1, 1), size=size, patch=patch, positions=64, norm="pre", reconstructor=reconstructor
    )


def small_single(*, size: int = 32, crop: int = 4) -> ModelConfig:
    """`tiny_single` with two layers of width 32."""
    return single_stream_model(
        width=32, depth=2, regions=RegionConfig(crop=crop), positions=64, size=size, norm="pre", dropout=0.0
    )


def made_model(seed: int = 0, std: float = 0.2, **options) -> VLModel:
    """A model with large random weights, so that every dependency shows."""
    torch.manual_seed(seed)
    model = VLModel(made_config(**options))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=std)
    return model


def made_batch(*, lengths: tuple[int, ...], seed: int = 0, size: int = 16) -> Batch:
    """`<s> words </s>` rows of the given lengths with random words and images."""
    generator = torch.Generator().manual_seed(seed)
    B, L = len(lengths), max(lengths)
    ids = torch.randint(len(SPECIALS), VOCAB, (B, L), generator=generator)
    length = torch.tensor(lengths)
    position = torch.arange(L)
    ids[:, 0] = SPECIALS["bos"]
    ids[position == length[:, None] - 1] = SPECIALS["eos"]
    ids[position >= length[:, None]] = SPECIALS["pad"]
    return Batch(
        image=torch.randint(0, 256, (B, 3, size, size), generator=generator, dtype=torch.uint8),
        ids=ids,
        length=length,
        seed=torch.randint(0, 2**62, (B,), generator=generator),
    )
