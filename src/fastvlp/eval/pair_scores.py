"""Scores of pairs by layers that read the text beside the image: by a matching head, or by the likelihood of the text."""

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

# Image states [B K D], or [1 K D] of one image for all, token ids [B L] and lengths [B] -> how well each text fits, [B].
Match = Callable[[Tensor, Tensor, Tensor], Tensor]


def mean_log_likelihood(
    model: VLModel, image_BKD: Tensor, ids_BL: Tensor, length_B: Tensor, *, bos: Bos = "blind"
) -> Tensor:
    """The mean log-probability of the tokens of each text, predicted left to right, </s> included -> [B].

    After an `official` <s>, which sees the whole text, the first word is not predicted.
    """
    state = model.read_causally(image_BKD, ids_BL, length_B, bos=bos)
    position = torch.arange(ids_BL.shape[1], device=ids_BL.device)
    predicted_BL = (position >= (0 if bos == "blind" else 1)) & (position < length_B[:, None] - 1)
    nll = head_loss(model.causal_head, state[predicted_BL], ids_BL.roll(-1, 1)[predicted_BL])
    total_B = torch.zeros(len(ids_BL), device=nll.device).index_add(0, predicted_BL.nonzero()[:, 0], nll.float())
    return -total_B / predicted_BL.sum(1).clamp(min=1)


def pair_matches(saved: Saved) -> dict[str, Match]:
    """Returns the methods by which a saved model scores pairs: `match`, by its image-text matching head, and `likelihood`,
    by the mean log-likelihood of the caption; those that it was trained for."""
    ways: dict[str, Match] = {}
    if scorer := matching_scorer(saved):
        ways["match"] = partial(scorer, saved.model)
    if any("write" in able for able in abilities(saved).values()):
        ways["likelihood"] = partial(mean_log_likelihood, saved.model, bos=saved_bos(saved))
    return ways


def pair_score(saved: Saved, by: Literal["match", "likelihood"] | None = None) -> tuple[str, Match]:
    """Returns the method by which a saved model scores pairs, and its name: `match` or `likelihood`.

    By its image-text matching head if it has one, else by the mean log-likelihood of the caption; or the way `by`. Raises
    UserError for a model that was not trained for it.
    """
    ways = pair_matches(saved)
    name: str = by or next(iter(ways), "")
    if name in ways:
        return name, ways[name]
    raise UserError(
        f"{saved.weights}: cannot score pairs{f' for `rerank_by` {by}' if by else ''}, which needs a run that was trained "
        f"with image-text matching (itm) or to write texts left to right (flm, ar, prefixlm); this one was trained with "
        f"{', '.join(abilities(saved)) or 'no objectives'}"
    )


def matching_scorer(saved: Saved) -> PairScorer | None:
    """Returns the function that scores pairs by the first matching head of an objective; None if there is none."""
    matching = (load_objective(saved, name) for name, able in abilities(saved).items() if "match" in able)
    return next((scorer for objective in matching if (scorer := objective.pair_scorer) is not None), None)
