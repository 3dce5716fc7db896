"""Rows of a batch with the same text or the same image. The text of one describes the image of the other, so that they are no
negatives of each other."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fastvlp.batch import Batch
from fastvlp.data.contents import image_hashes, text_hashes

# `ignored`: pairs with an equal text or image are no negatives of each other. `negatives`: they are, as published.
EqualPairs = Literal["ignored", "negatives"]


def contents(batch: Batch) -> Tensor:
    """Hashes of the text and of the image of each row, int64 [B 2], equal for equal contents on every rank.

    The image is what was read, before augmentation: its pixels, or the stored states, and a detector's features of its
    regions. Padding changes nothing. The chance that two others get the same hash is at most 2**-32 for each pair of rows.
    A batch that a loader made for an objective that contrasts its rows has them already: each image is hashed once.
    """
    if batch.content is not None:
        return batch.content
    image, regions = batch.image if batch.plain is None else batch.plain, batch.regions
    image_B = image_hashes(
        image, None if regions is None else regions.feature, None if regions is None else regions.count
    )
    return torch.stack([text_hashes(batch.ids, batch.length), image_B], 1)


def are_equal(content_B2: Tensor, content_M2: Tensor) -> Tensor:
    """Whether a row and a column have the same text or the same image: bool [B M]."""
    text_BM, image_BM = (content_B2[:, None, i] == content_M2[:, i] for i in (0, 1))
    return text_BM | image_BM


def wrong_pairs(batch: Batch, equal_pairs: EqualPairs) -> Tensor:
    """Returns which texts of a batch are wrong for the image of a row: bool [B B]."""
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
