"""Calibration of cosines. The cosines of matching pairs may lie between 0.25 and 0.35 for one model, and between 0.6 and 0.9
for another."""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import isfinite
from typing import Any, NamedTuple

import numpy as np

# Pairs below which quantiles say little.
FEWEST = 20
# Share of texts whose own image is below `near`, and of random pairs that may reach it.
MISSED = 0.05
# Field in which engines keep it.
FIELD = "calibration"


class Calibration(NamedTuple):
    """Cosines of pairs that were drawn when an index was built.

    Attributes:
        random: Mean of a text and another text's image.
        own: Median of a text and its own image.
        near: What all but one in twenty texts reach with their own image.
        images: Mean of two images.
        reached: Share of texts' random other images that reach `near` too.
    """

    random: float
    own: float
    near: float
    images: float
    reached: float = 0.0

    @property
    def tells(self) -> bool:
        """Whether the model tells the images of texts from random ones: at most one in twenty of these are as near."""
        return self.reached <= MISSED

    def is_near(self, score: float) -> bool | None:
        """Whether an image is as near to a text as all but one in twenty are to their own; None if the model cannot tell."""
        return score >= self.near if self.tells else None

    def relevance(self, score: float, by_text: bool) -> float | None:
        """Returns a score between that of random pairs, 0, and that of a text and its own image, or of an image and itself,
        1; None if these are equal, or where the model cannot tell pairs from random ones."""
        if by_text and not self.tells:
            return None
        low, high = (self.random, self.own) if by_text else (self.images, 1.0)
        return min(1.0, max(0.0, (score - low) / (high - low))) if high - low > 1e-3 else None

    def to_json(self) -> str:
        return json.dumps(self._asdict())

    @classmethod
    def read(cls, fields: Mapping[str, Any] | None) -> Calibration | None:
        """Reads what an engine keeps in its fields; None if there is none."""
        try:
            values = json.loads((fields or {})[FIELD])
            given = {name: values[name] for name in cls._fields if name in values or name not in cls._field_defaults}
            calibration = cls(**{name: float(value) for name, value in given.items()})
        except (KeyError, TypeError, ValueError):
            return None
        return calibration if all(map(isfinite, calibration)) else None


class PairSample:
    """Pairs, drawn with equal chance from all that are added."""

    def __init__(self, width: int, most: int = 1000):
        self.most, self._draw = most, np.random.default_rng(0)
        self._number_N, self._rows = np.empty(0), (np.empty((0, width), np.float32), np.empty((0, width), np.float32))

    def add(self, image_NE: np.ndarray, text_NE: np.ndarray) -> None:
        """Adds pairs; row i of both is of one."""
        number_N = np.concatenate([self._number_N, self._draw.random(len(image_NE))])
        # Those with the smallest numbers stay.
        chosen = np.argsort(number_N)[: self.most]
        self._number_N = number_N[chosen]
        image_NE, text_NE = (np.concatenate(both)[chosen] for both in zip(self._rows, (image_NE, text_NE)))
        self._rows = image_NE, text_NE

    def calibrated(self) -> Calibration | None:
        """Returns what cosines mean; None if there are too few pairs."""
        return calibrated(*self._rows)


def calibrated(image_NE: np.ndarray, text_NE: np.ndarray) -> Calibration | None:
    """Measures it on pairs: row i of both is of one. Returns None if there are too few."""
    if len(image_NE) < FEWEST:
        return None
    own_N = (image_NE * text_NE).sum(1)
    # Of several texts of one image, the others' image is the same.
    other_NN = (image_NE @ image_NE.T) < 1 - 1e-5
    if not other_NN.any():
        return None
    random_N, near = (text_NE @ image_NE.T)[other_NN], float(np.quantile(own_N, MISSED))
    return Calibration(
        random=float(random_N.mean()),
        own=float(np.median(own_N)),
        near=near,
        reached=float((random_N >= near).mean()),
        images=float((image_NE @ image_NE.T)[other_NN].mean()),
    )
