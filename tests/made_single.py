"""Small made models with a single stream, and batches with regions."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fastvlp.batch import Batch, Regions
from fastvlp.model.encoders.text_transformer import TextTransformerConfig
from fastvlp.model.encoders.vit import ViTConfig
from fastvlp.model.layers import LayerConfig, Norm
from fastvlp.model.model import ModelConfig, VLModel
from fastvlp.model.region_embedding import RegionConfig
from fastvlp.model.single_stream import SingleConfig
from tests.made import SPECIALS, VOCAB, made_batch

FEATURE, CLASSES = 6, 5


def single_config(*, norm: Norm = "post", crop: int | None = None, mask: str = "learned") -> ModelConfig:
    layer = LayerConfig(width=32, heads=4, hidden=64, norm=norm)
    regions = RegionConfig(feature=FEATURE, crop=crop, mask=mask)
    return ModelConfig(
        image=ViTConfig(size=16, patch=8, depth=0, layer=layer),
        text=TextTransformerConfig(positions=32, depth=0, layer=layer, vocab=VOCAB, **SPECIALS),
        single=SingleConfig(depth=2, layer=layer, regions=regions, types=3),
    )


def single_model(seed: int = 0, std: float = 0.2, **options) -> VLModel:
    """With large random weights, so that every dependency shows."""
    torch.manual_seed(seed)
    model = VLModel(single_config(**options))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=std)
    return model


def region_batch(*, lengths: tuple[int, ...], counts: tuple[int, ...], seed: int = 0) -> Batch:
    """Random words, boxes, features and shares of classes; padding is zeros."""
    generator = torch.Generator().manual_seed(seed)
    B, R = len(counts), max(counts)
    real = torch.arange(R) < torch.tensor(counts)[:, None]
    low, size = (torch.rand(B, R, 2, generator=generator) * 0.5 for _ in range(2))
    feature = torch.randn(B, R, FEATURE, generator=generator)
    share = torch.rand(B, R, CLASSES, generator=generator).softmax(-1)
    box, feature, share = (x * real[..., None] for x in (torch.cat([low, low + size + 0.01], -1), feature, share))
    regions = Regions(box=box, count=torch.tensor(counts), feature=feature, classes=share)
    return replace(made_batch(lengths=lengths, seed=seed), regions=regions)


def row_of(batch: Batch, b: int) -> Batch:
    """Row `b` alone, without padding."""
    assert batch.regions is not None
    n, r = int(batch.length[b]), int(batch.regions.count[b])
    parts = {name: cut(getattr(batch.regions, name), b, r) for name in ("box", "feature", "classes")}
    return Batch(
        image=batch.image[b : b + 1],
        ids=batch.ids[b : b + 1, :n],
        length=batch.length[b : b + 1],
        seed=batch.seed[b : b + 1],
        regions=Regions(count=batch.regions.count[b : b + 1], **parts),
    )


def cut(x_BRC: Tensor | None, b: int, r: int) -> Tensor | None:
    return None if x_BRC is None else x_BRC[b : b + 1, :r]
