"""EfficientNet (arXiv 1905.11946) as timm lays out `tf_efficientnet_*`, computed by transformers: BriVL's image trunk."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from fastvlp.convert.preprocessing import IMAGENET_MEAN, IMAGENET_STD
from fastvlp.convert.weight_map import WeightMap, Weights, apply_map, layer_numbers
from fastvlp.errors import UserError
from fastvlp.model.encoders.efficientnet_shapes import SIZES, efficientnet
from fastvlp.model.encoders.transformers_image import TransformersImageConfig

NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
# Parts of a block, theirs -> ours: those of the first stage, whose blocks do not expand, and those of the others.
PLAIN = {"conv_dw": "depthwise_conv.depthwise_conv", "bn1": "depthwise_conv.depthwise_norm"}
PLAIN |= {"conv_pw": "projection.project_conv", "bn2": "projection.project_bn"}
EXPANDED = {"conv_pw": "expansion.expand_conv", "bn1": "expansion.expand_bn"}
EXPANDED |= {"conv_dw": "depthwise_conv.depthwise_conv", "bn2": "depthwise_conv.depthwise_norm"}
EXPANDED |= {"conv_pwl": "projection.project_conv", "bn3": "projection.project_bn"}
SQUEEZE = {"se.conv_reduce": "squeeze_excite.reduce", "se.conv_expand": "squeeze_excite.expand"}


def efficientnet_config(name: str, size: int) -> TransformersImageConfig:
    """The encoder that timm calls `name`, such as tf_efficientnet_b5_ns, for images of `size` pixels. Raises UserError for a
    name that is none of these, and for an odd size, which the stem pads otherwise."""
    match = re.fullmatch(r"tf_efficientnet_(b\d)(_\w+|\.\w+)?", name)
    if match is None or match[1] not in SIZES:
        raise UserError(
            f"its image encoder is {name} of timm; of those EfficientNet b0 to b7 are known (tf_efficientnet_b5_ns)"
        )
    if size % 2:
        raise UserError(f"images of {size} pixels: an EfficientNet with TensorFlow's padding needs an even number")
    return TransformersImageConfig(
        size=size, mean=IMAGENET_MEAN, std=IMAGENET_STD, architecture=efficientnet(match[1], size)
    )


def efficientnet_weights(weights: Weights, prefix: str) -> dict[str, Tensor]:
    """Parameters of the encoder by their names in ours. `prefix` comes before timm's names. Raises UserError if a tensor is
    missing or left over."""
    own = {name.removeprefix(prefix): x for name, x in weights.items() if name.startswith(prefix)}
    sources: dict[str, tuple[str, ...]] = {"model.embeddings.convolution.weight": ("conv_stem.weight",)}
    sources |= _norm("model.embeddings.batchnorm", "bn1")
    sources |= {"model.encoder.top_conv.weight": ("conv_head.weight",)} | _norm("model.encoder.top_bn", "bn2")
    number = 0
    for stage in sorted(layer_numbers(own, "blocks.")):
        for block in sorted(layer_numbers(own, f"blocks.{stage}.")):
            theirs, ours = f"blocks.{stage}.{block}", f"model.encoder.blocks.{number}"
            sources |= _block(ours, theirs, EXPANDED if f"{theirs}.conv_pwl.weight" in own else PLAIN)
            number += 1
    return apply_map(own, WeightMap(sources=sources, unused=("classifier.",)), layout="timm's tf_efficientnet")


def _block(ours: str, theirs: str, parts: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    sources: dict[str, tuple[str, ...]] = {}
    for name, own in parts.items():
        if name.startswith("bn"):
            sources |= _norm(f"{ours}.{own}", f"{theirs}.{name}")
        else:
            sources[f"{ours}.{own}.weight"] = (f"{theirs}.{name}.weight",)
    for name, own in SQUEEZE.items():
        sources |= {f"{ours}.{own}.{part}": (f"{theirs}.{name}.{part}",) for part in ("weight", "bias")}
    return sources


def _norm(ours: str, theirs: str) -> dict[str, tuple[str, ...]]:
    return {f"{ours}.{part}": (f"{theirs}.{part}",) for part in NORM}
