"""Shapes of EfficientNet (arXiv 1905.11946), as configs of transformers: BriVL's image trunk."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

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


def efficientnet(name: str, size: int) -> dict[str, Any]:
    """The config of a published size, b0 to b7, for images of `size` pixels, an even number. Raises KeyError for another."""
    wide, deep = SIZES[name]
    architecture: dict[str, Any] = {
        "model_type": "efficientnet",
        "width_coefficient": wide,
        "depth_coefficient": deep,
        "hidden_dim": _rounded(1280 * wide),
        "hidden_act": "swish",
        "batch_norm_eps": 1e-3,
        # As timm builds it, where dropping blocks has to be asked for.
        "drop_connect_rate": 0.0,
    }
    return at_size(architecture, size)


def at_size(architecture: Mapping[str, Any], size: int) -> dict[str, Any]:
    """The config of the same network for images of another size.

    TensorFlow pads a map before it is halved so that an odd side is padded alike on both ends, and an even one at its end
    alone. The config lists the blocks of the first kind, which depend on the image size.
    """
    repeats = architecture.get("num_block_repeats", [blocks for blocks, _, _ in STAGES])
    strides = architecture.get("strides", [stride for _, stride, _ in STAGES])
    # What a config does not state is b7's.
    deep = architecture.get("depth_coefficient", SIZES["b7"][1])
    stages = zip(strides, (math.ceil(deep * blocks) for blocks in repeats))
    return {**architecture, "image_size": size, "depthwise_padding": [*_halved_from_odd(size, stages)]}


def _halved_from_odd(size: int, stages: Iterable[tuple[int, int]]) -> Iterator[int]:
    """Numbers of the blocks that halve a map of an odd side. A stage is a stride and its number of blocks."""
    side, number = size // 2, 0
    for stride, blocks in stages:
        if stride == 2:
            if side % 2:
                yield number
            side = -(-side // 2)
        number += blocks


def _rounded(channels: float) -> int:
    new = max(8, int(channels + 4) // 8 * 8)
    return new + 8 if new < 0.9 * channels else new
