"""The second stage of retrieval: layers that read an image and a text together score the shortlists of the embeddings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fastvlp.data.records.interface import Records
from fastvlp.eval.encoding import LoadedModel
from fastvlp.eval.pair_scores import Match
from fastvlp.eval.split_reading import image_batches

# Texts that are read beside one image at a time.
ROWS = 256


def score_pairs(
    loaded: LoadedModel, match: Match, shards: Records, texts: Sequence[str], texts_of_image: Sequence[Tensor]
) -> Iterator[Tensor]:
    """Scores of pairs of an image and a text.

    Each image is encoded once, and its keys and values are computed once for ROWS of its texts.

    Args:
        texts_of_image: for each record, the indices of the texts that its image is paired with.

    Yields:
        For each record, the scores of those pairs, in the same order.
    """
    ids_TL, length_T = (part.to(loaded.device) for part in loaded.tokenizer.encode(list(texts), loaded.max_length))
    with loaded.inference():
        for rows, images in image_batches(shards, loaded, "re-ranking"):
            image_BKD = loaded.model.encode_image(images.image.to(loaded.device))
            for states_KD, own in zip(image_BKD, texts_of_image[rows]):
                parts = [
                    match(states_KD[None], ids_TL[some, : int(length_T[some].max())], length_T[some])
                    for some in own.split(ROWS)
                ]
                yield torch.cat(parts)
