"""Hashes of what a row holds, by which equal texts and equal images are recognised.

A hash is a sum of products modulo 2**64 (multilinear hashing; Lemire and Kaser 2014, arXiv 1202.4961): each half of an
8-byte word has a random factor of its own, so that two others have the same hash with a probability of 2**-32 at most. The
sum is the same in one product of vectors for a single image and in a few operations for a batch.
"""

from __future__ import annotations

import mmap
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastvlp.random import hash64_rows

# Salts of the random factors.
_WHOLE, _UPPER = 771, 772
# Words of 8 bytes that are hashed at a time, because of the temporary copies: 128 MB.
_WORDS = 1 << 24
# On a CPU, rows of more words are hashed one by one, which needs no copies: ten times as fast for an image of 224 pixels.
_SHORT = 2048


# Texts of a few dozen lengths, and an image.
@lru_cache(maxsize=64)
def _factors(words: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The factors of each place of a word, and those of its upper half, int64 [N]."""
    place_N = torch.arange(words, device=device)
    return hash64_rows(_WHOLE, place_N) * 2 + 1, hash64_rows(_UPPER, place_N) * 2 + 1


def hash_rows(x: Tensor) -> Tensor:
    """A hash of the bytes of each row of [B ...]: int64 [B]. Zeros at the end of a row change nothing."""
    bytes_BN = x.detach().flatten(1).contiguous().view(torch.uint8)
    if not bytes_BN.shape[1]:
        return torch.zeros(len(x), dtype=torch.int64, device=x.device)
    over = -bytes_BN.shape[1] % 8
    words_BN = (F.pad(bytes_BN, (0, over)) if over else bytes_BN).view(torch.int64)
    if x.device.type == "cpu" and words_BN.shape[1] > _SHORT:
        return torch.tensor([hash_one(row) for row in words_BN])
    whole_N, upper_N = _factors(words_BN.shape[1], x.device)
    if x.device.type == "cpu":
        # numpy takes a fraction of torch's time for so few numbers, and a loader hashes each batch.
        words = words_BN.numpy()
        return torch.from_numpy(words @ whole_N.numpy() + (words >> 32) @ upper_N.numpy())
    rows = max(1, _WORDS // words_BN.shape[1])
    return torch.cat([(part * whole_N + (part >> 32) * upper_N).sum(1) for part in words_BN.split(rows)])


def hash_one(x: Tensor) -> int:
    """`hash_rows` of a single row, in a fraction of the time."""
    data = np.ascontiguousarray(x.numpy()).reshape(-1).view(np.uint8)
    if len(data) % 8:
        data = np.pad(data, (0, -len(data) % 8))
    words = data.view(np.int64)
    whole, upper = _factors(len(words), x.device)
    total = int(np.dot(words, whole.numpy())) + int(np.dot(words >> 32, upper.numpy()))
    return (total + 2**63) % 2**64 - 2**63


def text_hashes(ids_BL: Tensor, length_B: Tensor) -> Tensor:
    """A hash of the tokens of each text: int64 [B]. Padding changes nothing."""
    position_L = torch.arange(ids_BL.shape[1], device=ids_BL.device)
    return hash_rows((ids_BL + 1) * (position_L < length_B[:, None]))


def image_hashes(image: Tensor, feature_BRF: Tensor | None, count_B: Tensor | None) -> Tensor:
    """A hash of each image, its pixels or stored states, with a detector's features of its regions where there are any."""
    image_B = hash_rows(image)
    if feature_BRF is None or count_B is None:
        return image_B
    is_padding_BR = torch.arange(feature_BRF.shape[1], device=image_B.device) >= count_B[:, None]
    return hash64_rows(image_B, hash_rows(feature_BRF.masked_fill(is_padding_BR[..., None], 0)))


class ImageHashes:
    """The hash of each record's image, computed when it is first read. Forked workers share them; a copy that was pickled
    begins anew."""

    def __init__(self, count: int):
        self._count = count
        memory = mmap.mmap(-1, 9 * max(1, count))
        self._hash = np.frombuffer(memory, np.int64, count)
        self._known = np.frombuffer(memory, np.uint8, count, 8 * count)

    def __call__(self, i: int, image: Tensor, feature_RF: Tensor | None = None) -> int:
        """The hash of record i, whose image and whose detector's features these are; as `image_hashes` gives it."""
        if self._known[i]:
            return int(self._hash[i])
        value = hash_one(image)
        if feature_RF is not None:
            value = int(hash64_rows(torch.tensor([value]), torch.tensor([hash_one(feature_RF)])))
        # Two workers may both compute it: they write the same. The flag comes last.
        self._hash[i] = value
        self._known[i] = 1
        return value

    def __reduce__(self) -> tuple[type[ImageHashes], tuple[int]]:
        return ImageHashes, (self._count,)
