"""Equal and nearly equal images in different splits: what a model was trained on is then in its test."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps

from fastvlp.data.records.decode import open_image

# Of the 64 bits of a perceptual hash. A copy at another size or quality differs in a few, other pictures in about half of all.
NEAR = 6
BANDS = 4
# Pictures of one hash also have about these colours, as a mean difference of a thumbnail of 8 by 8: the hash sees greys.
COLOURS = 8.0
# Of a bucket with more pictures, the hash says too little (plain areas).
MOST = 2000


@dataclass(frozen=True, kw_only=True)
class Duplicate:
    """An image that is in two records.

    Attributes:
        first, second: (split, key) of both.
        exact: the same bytes; otherwise the pictures look the same (perceptual hash).
    """

    first: tuple[str, str]
    second: tuple[str, str]
    exact: bool


class Looks(NamedTuple):
    """The appearance of a picture: bits [64] of a perceptual hash, and colours of a thumbnail [192]."""

    bits: np.ndarray
    colours: np.ndarray


class ImageHashes:
    """Collects the hashes of the images of all splits.

    Attributes:
        perceptual: whether pictures that only look the same are found too, which needs the package `imagehash`.
    """

    def __init__(self) -> None:
        self._places: list[tuple[str, str]] = []
        self._contents: list[bytes] = []
        self._looks: list[Looks | None] = []
        self._hash: Any = None
        with suppress(ImportError):
            import imagehash

            self._hash = imagehash.phash
        self.perceptual = self._hash is not None

    def hashes(self, data: bytes) -> tuple[bytes, Looks | None]:
        """The hash of an image's bytes and what it looks like."""
        looks = None
        if self._hash is not None:
            with open_image(data) as image:
                image.draft("RGB", (256, 256))
                rgb = ImageOps.exif_transpose(image).convert("RGB")
            colours = np.asarray(rgb.resize((8, 8), Image.Resampling.BOX), np.int16).reshape(-1)
            looks = Looks(np.asarray(self._hash(rgb).hash).reshape(-1), colours)
        return hashlib.blake2b(data, digest_size=16).digest(), looks

    def add(self, split: str, key: str, hashes: Sequence[tuple[bytes, Looks | None]]) -> None:
        """Adds the images of a record."""
        for content, looks in hashes:
            self._places.append((split, key))
            self._contents.append(content)
            self._looks.append(looks)

    def across_splits(self) -> list[Duplicate]:
        """Every image that is in a record of another split too, once, with the first such record; the exact ones first."""
        done = set[int]()
        by_content: dict[bytes, list[int]] = defaultdict(list)
        by_band: dict[tuple[int, bytes], list[int]] = defaultdict(list)
        for i, (content, looks) in enumerate(zip(self._contents, self._looks)):
            by_content[content].append(i)
            if looks is not None:
                # Pictures with few other bits are equal in one of the bands.
                for band, part in enumerate(np.packbits(looks.bits).reshape(BANDS, -1)):
                    by_band[band, part.tobytes()].append(i)
        duplicates = [pair for same in by_content.values() for pair in self._pairs(same, done, exact=True)]
        near = (places for places in by_band.values() if len(places) <= MOST)
        return duplicates + [pair for places in near for pair in self._pairs(places, done, exact=False)]

    def _pairs(self, places: Sequence[int], done: set[int], *, exact: bool) -> Iterator[Duplicate]:
        if len({self._places[i][0] for i in places}) < 2:
            return
        for n, i in enumerate(places):
            others = [j for j in places[:n] if self._places[j][0] != self._places[i][0]]
            if i in done or not others:
                continue
            if (first := others[0] if exact else self._nearest(i, others)) is not None:
                done.add(i)
                yield Duplicate(first=self._places[first], second=self._places[i], exact=exact)

    def _nearest(self, i: int, others: Sequence[int]) -> int | None:
        """The one of the others that looks like image i; None if none does."""
        own, looks = self._looks[i], [self._looks[j] for j in others]
        assert own is not None
        bits = np.stack([one.bits for one in looks if one is not None])
        colours = np.stack([one.colours for one in looks if one is not None])
        near = ((bits != own.bits).sum(1) <= NEAR) & (np.abs(colours - own.colours).mean(1) <= COLOURS)
        return others[int(near.argmax())] if near.any() else None
