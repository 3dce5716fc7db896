"""How well a text fits an image by layers in which it reads it: a matching head's opinion, or how likely the text is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from fastvlp.errors import UserError
from fastvlp.model.model import Bos, VLModel
from fastvlp.model.saving import Saved, load_exactly
from fastvlp.objectives.itm import ITMConfig
from fastvlp.objectives.losses import head_loss

# How well each text [B] fits its image, whose states are [B K D]; or one image of all, [1 K D].
Match = Callable[[Tensor, Tensor, Tensor], Tensor]
# Objectives that learn to write a text left to right.
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
    kinds, model = saved.kinds, saved.model
    itm_name = next((name for name, kind in kinds.items() if kind == "ITMConfig"), None)
    if itm_name and by != "likelihood":
        itm = ITMConfig().build(model.config, saved.tokenizer)
        load_exactly(itm, saved.learned(itm_name), saved.weights)
        itm.to(next(model.parameters()).device).eval()
        return "match", lambda image, ids, length: itm.scores(model, image, ids, length).float().diff(dim=1)[:, 0]
    if CAUSAL & {*kinds.values()} and by != "match":
        told = [config.get("bos") for config in saved.info["objectives"].values()]
        bos: Bos = "official" if "official" in told else "blind"
        return "likelihood", lambda image, ids, length: mean_log_likelihood(model, image, ids, length, bos=bos)
    raise UserError(
        f"{saved.weights}: re-ranking needs a run that was trained with image-text matching (itm) or to write texts left "
        f"to right (flm, ar, prefixlm); this one{f', for `rerank_by` {by},' if by else ''} has "
        f"{', '.join(kinds) or 'no objectives'}"
    )
