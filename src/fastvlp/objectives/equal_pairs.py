"""Rows of a batch with the same text or the same image. The text of one describes the image of the other, so that they are no
negatives of each other."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvlp.batch import Batch
from fastvlp.random import hash64_rows

# `ignored`: pairs with an equal text or image are no negatives of each other. `negatives`: they are, as published.
EqualPairs = Literal["ignored", "negatives"]

# An odd number without structure, and the salt of further ones.
_MIXER, _WEIGHT = 0x2545F4914F6CDD1D, 771
# Words of 8 bytes that are hashed at a time, because of the temporary copies: as many as a CPU's cache holds, which is twice
# as fast as all at once; 128 MB elsewhere.
_WORDS_CPU, _WORDS = 1 << 18, 1 << 24


def contents(batch: Batch) -> Tensor:
    """Hashes of the text and of the image of each row, int64 [B 2], equal for equal contents on every rank.

    The image is what was read, before augmentation: its pixels, or the stored states, and a detector's features of its
    regions. Padding changes nothing. The chance that two others get the same hash is below 2**-32 for each pair of rows.
    """
    if batch.content is not None:
        return batch.content
    position_L = torch.arange(batch.ids.shape[1], device=batch.ids.device)
    words_BL = (batch.ids + 1) * (position_L < batch.length[:, None])
    text_B = _hash_words(words_BL, _weights(words_BL))
    image_B = hash_rows(batch.image if batch.plain is None else batch.plain)
    regions = batch.regions
    if regions is not None and regions.feature is not None:
        is_padding_BR = torch.arange(regions.feature.shape[1], device=image_B.device) >= regions.count[:, None]
        image_B = hash64_rows(image_B, hash_rows(regions.feature.masked_fill(is_padding_BR[..., None], 0)))
    return torch.stack([text_B, image_B], 1)


def hash_rows(x: Tensor) -> Tensor:
    """A hash of the bytes of each row of [B ...]: int64 [B]. Zeros at the end of a row change nothing."""
    bytes_BN = x.detach().flatten(1).contiguous().view(torch.uint8)
    words_BN = F.pad(bytes_BN, (0, -bytes_BN.shape[1] % 8)).view(torch.int64)
    most = _WORDS_CPU if x.device.type == "cpu" else _WORDS
    rows, weight_N = max(1, most // max(1, words_BN.shape[1])), _weights(words_BN)
    return torch.cat([_hash_words(part, weight_N) for part in words_BN.split(rows)])


def _weights(words_BN: Tensor) -> Tensor:
    """A random odd number for each place of a word."""
    return hash64_rows(_WEIGHT, torch.arange(words_BN.shape[1], device=words_BN.device)) * 2 + 1


def _hash_words(words_BN: Tensor, weight_N: Tensor) -> Tensor:
    """The sum of words times odd numbers, modulo 2**64. Each word is mixed first, so that the upper half of its bits reaches
    the lower half: differences in the upper bits of two words would often cancel."""
    mixed_BN = words_BN * _MIXER
    mixed_BN ^= (mixed_BN >> 32) & 0xFFFFFFFF
    return (mixed_BN * weight_N).sum(1)


def are_equal(content_B2: Tensor, content_M2: Tensor) -> Tensor:
    """Whether a row and a column have the same text or the same image: bool [B M]."""
    text_BM, image_BM = (content_B2[:, None, i] == content_M2[:, i] for i in (0, 1))
    return text_BM | image_BM


def wrong_pairs(batch: Batch, equal_pairs: EqualPairs) -> Tensor:
    """Which texts of a batch are wrong for the image of a row: bool [B B]."""
    if equal_pairs == "negatives":
        return ~torch.eye(len(batch), dtype=torch.bool, device=batch.ids.device)
    content_B2 = contents(batch)
    return ~are_equal(content_B2, content_B2)


def has_equal(content_M2: Tensor) -> Tensor:
    """Whether another row has the same text or the same image: bool [M], in memory O(M)."""
    found_M = torch.zeros(len(content_M2), dtype=torch.bool, device=content_M2.device)
    for hash_M in content_M2.unbind(1):
        sorted_M, order_M = hash_M.sort()
        same = sorted_M[1:] == sorted_M[:-1]
        found_M[order_M[1:]] |= same
        found_M[order_M[:-1]] |= same
    return found_M
