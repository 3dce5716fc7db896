"""The second stage of retrieval: layers in which the text reads the image score the towers' shortlists once more."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from fastvlp.data.shards import Shards
from fastvlp.errors import UserError
from fastvlp.eval.embedding import Reader, image_batches
from fastvlp.model.model import Bos, VLModel
from fastvlp.model.saved import Saved, load_exactly
from fastvlp.objectives.itm import ITMConfig
from fastvlp.objectives.losses import head_loss

# How well each text [B] fits one image, whose states are [1 K D].
Match = Callable[[Tensor, Tensor, Tensor], Tensor]
# Texts that are read beside an image at a time.
ROWS = 256
CAUSAL = {"FLMConfig", "ARConfig", "PrefixLMConfig", "CaptionConfig"}


def mean_log_likelihood(
    model: VLModel, image_BKD: Tensor, ids_BL: Tensor, length_B: Tensor, *, bos: Bos = "blind"
) -> Tensor:
    """Log-probability of each text left to right, </s> included, divided by its predicted tokens -> [B]. After an
    `official` <s>, which sees the text, the first word is not predicted."""
    state = model.read_causally(image_BKD, ids_BL, length_B, bos=bos)
    position = torch.arange(ids_BL.shape[1], device=ids_BL.device)
    asked = (position >= (0 if bos == "blind" else 1)) & (position < length_B[:, None] - 1)
    nll = head_loss(model.causal_head, state[asked], ids_BL.roll(-1, 1)[asked])
    total_B = torch.zeros(len(ids_BL), device=nll.device).index_add(0, asked.nonzero()[:, 0], nll.float())
    return -total_B / asked.sum(1).clamp(min=1)


def pair_score(saved: Saved, by: Literal["match", "likelihood"] | None = None) -> tuple[str, Match]:
    """How a run that reads texts beside images scores a pair, and the name of it: by its image-text matching head where it
    has one, else by the caption's mean log-likelihood, or as told. Raises UserError for a run that did not learn it."""
    told: dict[str, dict[str, Any]] = saved.info.get("objectives", {})
    kinds = {name: config.get("type") for name, config in told.items()}
    model = saved.model
    itm_name = next((name for name, kind in kinds.items() if kind == "ITMConfig"), None)
    if itm_name and by != "likelihood":
        itm = ITMConfig().build(model.config, saved.tokenizer)
        parts = [(key.partition("."), value) for key, value in saved.objectives.items()]
        load_exactly(itm, {key: value for (name, _, key), value in parts if name == itm_name}, saved.weights)
        itm.to(next(model.parameters()).device).eval()
        return "match", lambda image, ids, length: itm.scores(model, image, ids, length).float().diff(dim=1)[:, 0]
    if CAUSAL & {*kinds.values()} and by != "match":
        bos: Bos = "official" if "official" in [config.get("bos") for config in told.values()] else "blind"
        return "likelihood", lambda image, ids, length: mean_log_likelihood(model, image, ids, length, bos=bos)
    raise UserError(
        f"{saved.weights}: re-ranking needs a run that was trained with image-text matching (itm) or to write texts left "
        f"to right (flm, ar, prefixlm); this one{f', for --rerank-by {by},' if by else ''} has "
        f"{', '.join(kinds) or 'no objectives'}"
    )


def score_pairs(
    reader: Reader, match: Match, shards: Shards, texts: Sequence[str], texts_of_image: Sequence[Tensor]
) -> Iterator[Tensor]:
    """Scores of the texts that are asked for beside each image, in order. Each image is encoded once, and its keys and
    values are made once for all of its texts (once for ROWS of them)."""
    ids_TL, length_T = (part.to(reader.device) for part in reader.tokenizer.encode(list(texts), reader.max_length))
    with reader.reading():
        for rows, image in image_batches(shards, reader, "re-ranking"):
            image_BKD = reader.model.encode_image(image.to(reader.device))
            for states_KD, asked in zip(image_BKD, texts_of_image[rows]):
                parts = [
                    match(states_KD[None], ids_TL[some, : int(length_T[some].max())], length_T[some])
                    for some in asked.split(ROWS)
                ]
                yield torch.cat(parts)
