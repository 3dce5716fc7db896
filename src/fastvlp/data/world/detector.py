"""Imitated detections of the scenes of the embedded corpus, for models that read a detector's regions (UNITER, BriVL 1.0).

No detector is run. A region's feature is the sum of a direction for its colour and one for its shape, as the last layer of a
trained detector would have them, blurred by doubts about the class and by noise. The box is a little off.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from random import Random
from typing import Any

import numpy as np

from fastvlp.data.records.detections import Detections, pack
from fastvlp.data.world.scene import COMBINATIONS

WIDTH = 64
_NOISE = 0.3
_SHIFT = 0.05  # greatest shift of an edge, as a share of the box's width or height

_COLUMN = {f"{colour} {shape}": i for i, (colour, shape) in enumerate(COMBINATIONS)}


@lru_cache
def _directions() -> np.ndarray:
    """The features of the classes, [C F]: their colour's plus their shape's, so that in the test split only the combination is
    new."""
    of = {word: _normal(Random(f"direction/{word}")) for pair in COMBINATIONS for word in pair}
    return np.stack([of[colour] + of[shape] for colour, shape in COMBINATIONS])


def _normal(rng: Random) -> np.ndarray:
    return np.array([rng.gauss(0, 1) for _ in range(WIDTH)], np.float32)


def detect(rng: Random, objects: Sequence[Mapping[str, Any]], size: int) -> tuple[bytes, list[float]]:
    """The npz with the regions of an image with these objects, and their confidences, falling."""
    confidences = sorted((round(rng.uniform(0.5, 1), 3) for _ in objects), reverse=True)
    order = rng.sample(range(len(objects)), len(objects))
    share_RC = np.zeros((len(objects), len(COMBINATIONS)), np.float32)
    box_R4 = np.zeros((len(objects), 4), np.float32)
    for r, at in enumerate(order):
        for name, share in objects[at]["class_distribution"].items():
            share_RC[r, _COLUMN[name]] = share
        x0, y0, x1, y1 = objects[at]["box"]
        sides = (x1 - x0, y1 - y0) * 2
        box_R4[r] = [(edge + rng.uniform(-_SHIFT, _SHIFT) * side) / size for edge, side in zip((x0, y0, x1, y1), sides)]
    noise_RF = np.stack([_normal(rng) for _ in objects])
    feature_RF = share_RC @ _directions() + _NOISE * noise_RF
    half = np.float16
    return pack(Detections(box_R4.clip(0, 1), feature_RF.astype(half), share_RC.astype(half))), confidences
