"""The second stage of retrieval: layers in which the text reads the image score the towers' shortlists once more."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fastvlp.data.records.shards import Shards
from fastvlp.eval.embedding import Reader, image_batches
from fastvlp.eval.pair_scores import Match

# Texts that are read beside an image at a time.
ROWS = 256


def score_pairs(
    reader: Reader, match: Match, shards: Shards, texts: Sequence[str], texts_of_image: Sequence[Tensor]
) -> Iterator[Tensor]:
    """Scores of the texts that are asked for beside each image, in order. Each image is encoded once, and its keys and
    values are made once for all of its texts (once for ROWS of them)."""
    ids_TL, length_T = (part.to(reader.device) for part in reader.tokenizer.encode(list(texts), reader.max_length))
    with reader.reading():
        for rows, images in image_batches(shards, reader, "re-ranking"):
            image_BKD = reader.model.encode_image(images.image.to(reader.device))
            for states_KD, asked in zip(image_BKD, texts_of_image[rows]):
                parts = [
                    match(states_KD[None], ids_TL[some, : int(length_T[some].max())], length_T[some])
                    for some in asked.split(ROWS)
                ]
                yield torch.cat(parts)
