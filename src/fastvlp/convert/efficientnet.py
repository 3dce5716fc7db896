"""EfficientNet (arXiv 1905.11946) as timm lays out `tf_efficientnet_*`, computed by transformers: BriVL's image trunk."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fastvlp.convert.preprocessing import IMAGENET_MEAN, IMAGENET_STD
from fastvlp.convert.weight_map import WeightMap, Weights, apply_map, layer_numbers
from fastvlp.errors import UserError
from fastvlp.model.encoders.transformers_image import TransformersImageConfig

# Factors of width and depth of each published size.
SIZES = {
    "b0": (1.0, 1.0),
    "b1": (1.0, 1.1),
    "b2": (1.1, 1.2),
    "b3": (1.2, 1.4),
    "b4": (1.4, 1.8),
    "b5": (1.6, 2.2),
    "b6": (1.8, 2.6),
    "b7": (2.0, 3.1),
}
# Of each stage of b0: blocks, stride, and size of the depthwise kernel.
STAGES = ((1, 1, 3), (2, 2, 3), (2, 2, 5), (3, 2, 3), (3, 1, 5), (4, 2, 5), (1, 1, 3))
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
    factors = SIZES.get(match[1]) if match else None
    if factors is None:
        raise UserError(
            f"its image encoder is {name} of timm; of those EfficientNet b0 to b7 are known (tf_efficientnet_b5_ns)"
        )
    if size % 2:
        raise UserError(
            f"images of {size} pixels: an EfficientNet of TensorFlow's padding reads an even number of them"
        )
    wide, deep = factors
    architecture: dict[str, Any] = {
        "model_type": "efficientnet",
        "image_size": size,
        "width_coefficient": wide,
        "depth_coefficient": deep,
        "hidden_dim": _rounded(1280 * wide),
        "hidden_act": "swish",
        "batch_norm_eps": 1e-3,
        "depthwise_padding": _symmetric(size, deep),
    }
    return TransformersImageConfig(size=size, mean=IMAGENET_MEAN, std=IMAGENET_STD, architecture=architecture)


def _rounded(channels: float) -> int:
    new = max(8, int(channels + 4) // 8 * 8)
    return new + 8 if new < 0.9 * channels else new


def _symmetric(size: int, deep: float) -> list[int]:
    """Numbers of the blocks whose map is halved from an odd side, and is then padded alike on both sides."""
    side, number, found = size // 2, 0, []
    for blocks, stride, _ in STAGES:
        if stride == 2:
            if side % 2:
                found.append(number)
            side = -(-side // 2)
        number += math.ceil(deep * blocks)
    return found


def efficientnet_weights(weights: Weights, prefix: str) -> dict[str, Tensor]:
    """Parameters of the encoder by their names in ours. `prefix` comes before timm's names. Raises UserError where a tensor is
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
