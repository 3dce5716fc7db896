"""How well a text fits an image by layers in which it reads it: a matching head's opinion, or how likely the text is."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from fastvlp.errors import UserError
from fastvlp.model.model import Bos, VLModel
from fastvlp.model.saving import Saved
from fastvlp.objectives.losses import head_loss
from fastvlp.objectives.objective import PairScorer
from fastvlp.objectives.saved_objectives import abilities, load_objective, saved_bos

# How well each text [B] fits its image, whose states are [B K D]; or one image of all, [1 K D].
Match = Callable[[Tensor, Tensor, Tensor], Tensor]


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
    model, learned = saved.model, abilities(saved)
    if by != "likelihood" and (scorer := matching_scorer(saved)):
        return "match", partial(scorer, model)
    if by != "match" and any("write" in able for able in learned.values()):
        return "likelihood", partial(mean_log_likelihood, model, bos=saved_bos(saved))
    raise UserError(
        f"{saved.weights}: re-ranking needs a run that was trained with image-text matching (itm) or to write texts left "
        f"to right (flm, ar, prefixlm); this one{f', for `rerank_by` {by},' if by else ''} has "
        f"{', '.join(learned) or 'no objectives'}"
    )


def matching_scorer(saved: Saved) -> PairScorer | None:
    """How the saved head of the first objective that has one scores pairs."""
    matching = (load_objective(saved, name) for name, able in abilities(saved).items() if "match" in able)
    return next((scorer for objective in matching if (scorer := objective.pair_scorer) is not None), None)
