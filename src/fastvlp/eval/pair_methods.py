"""The methods by which a run scores pairs of a picture and a text, for benchmarks that compare such scores."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fastvlp.errors import UserError
from fastvlp.eval.benchmark_items import Pairs
from fastvlp.eval.embedding import embed_images, embed_texts
from fastvlp.eval.encoding import OpenedRun
from fastvlp.eval.pair_scores import Match, pair_matches
from fastvlp.eval.rerank import score_pairs
from fastvlp.objectives.saved_objectives import abilities

# cosine: of the embeddings. match: by the image-text matching head. likelihood: the mean log-likelihood of the text's tokens.
PairMethod = Literal["cosine", "match", "likelihood"]


def pair_methods(opened: OpenedRun, by: PairMethod | None = None) -> dict[str, Match | None]:
    """The ways in which a run can score pairs, or only `by`; None stands for the cosine, which needs no pass for each pair.

    Raises UserError if there is none, and for a run that reads regions, which the pictures of a benchmark do not have.
    """
    config = opened.saved.model.config
    if config.single is not None or (config.embed is not None and config.embed.reads_boxes):
        raise UserError(
            f"{opened.saved.weights}: the model reads regions of a picture, but a benchmark has none; choose a run that reads "
            f"whole pictures"
        )
    ways: dict[str, Match | None] = {} if config.embed is None else {"cosine": None}
    ways |= pair_matches(opened.saved)
    chosen = {name: way for name, way in ways.items() if by in (None, name)}
    if not chosen:
        trained = ", ".join(abilities(opened.saved)) or "no objectives"
        raise UserError(
            f"{opened.saved.weights}: cannot score pairs{f' `by` {by}' if by else ''}: the cosine needs a joint space "
            f"(`model.embed`), match needs image-text matching (itm), and likelihood an objective that writes texts left to "
            f"right (flm, ar, prefixlm); this run was trained with {trained}, and can score by {', '.join(ways) or 'none'}"
        )
    return chosen


def score_by_all(opened: OpenedRun, pairs: Pairs, by: PairMethod | None = None) -> dict[str, Tensor]:
    """The score of each pair, fp32 [P] on the CPU, by each of `pair_methods`: the higher, the better the text fits.

    Pictures are encoded once for each method. Raises UserError if the run cannot score pairs, or a picture cannot be read.
    """
    scores = {
        name: _cosines(opened, pairs) if match is None else _matches(opened, pairs, match)
        for name, match in pair_methods(opened, by).items()
    }
    return {name: score_P.float().cpu() for name, score_P in scores.items()}


def _cosines(opened: OpenedRun, pairs: Pairs) -> Tensor:
    image_IE = embed_images(opened.loaded, pairs.pictures)
    text_TE = embed_texts(opened.loaded, pairs.texts)
    device = image_IE.device
    return (image_IE[pairs.image_P.to(device)] * text_TE[pairs.text_P.to(device)]).sum(1)


def _matches(opened: OpenedRun, pairs: Pairs, match: Match) -> Tensor:
    order = pairs.image_P.argsort(stable=True)
    count_I = pairs.image_P.bincount(minlength=len(pairs.pictures))
    texts_of_image = pairs.text_P[order].split(count_I.tolist())
    sorted_P = torch.cat(list(score_pairs(opened.loaded, match, pairs.pictures, pairs.texts, texts_of_image)))
    return torch.empty_like(sorted_P).index_copy(0, order.to(sorted_P.device), sorted_P)
