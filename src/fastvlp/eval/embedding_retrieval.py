"""Image-text retrieval on a split: the embeddings rank all candidates, and a model that reads an image and a text together
may re-rank the best of them."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from fastvlp.data.records.shards import Shards
from fastvlp.errors import UserError
from fastvlp.eval.embedding import SplitEmbeddings, embed_split
from fastvlp.eval.encoding import WHOLE_IMAGES, LoadedModel, MaskedEncoding, RunFolder, open_run, open_towers
from fastvlp.eval.evaluation import Evaluation, evaluation
from fastvlp.eval.pair_scores import Match, pair_score
from fastvlp.eval.ranks import (
    ROUNDING,
    cosine,
    ranks,
    recall,
    recall_chance,
    recall_errors,
    reranked,
    score_shortlists,
    shortlist,
    transposed,
)
from fastvlp.eval.rerank import score_pairs
from fastvlp.eval.split_reading import open_split, read_captions


@evaluation
def evaluate_retrieval(
    run: RunFolder,
    /,
    *,
    data: str | Path,
    split: str = "test",
    captions: str | None = None,
    rerank: str | None = None,
    rerank_by: Literal["match", "likelihood"] | None = None,
    top: int = 16,
    above_chance: bool = False,
    encoding: MaskedEncoding = WHOLE_IMAGES,
) -> Evaluation:
    """Find images by their captions and captions by their images, among all images and captions of a split.

    All candidates are ranked by the cosines of the embeddings (`towers`). With `rerank`, a run that reads image and text
    together then re-ranks the best candidates (`reranked`). The result is also added to a file in the folder of the run.

    Args:
        run: Folder of the run.
        data: Folder of shards, or folder with a sub-folder for each split.
        split: Sub-folder of `data` to use, if there is one of this name.
        captions: Field of the records with the captions; by default the field that the run was trained on.
        rerank: Folder of a run whose fusion layers re-rank the best candidates; `self` uses those of the run itself.
        rerank_by: Re-rank by the image-text matching head or by the likelihood of the caption; by default by the head, if
            the run has one.
        top: Number of candidates of each query that are re-ranked.
        above_chance: Fail, after saving the result, unless recall is twice chance and five standard errors above it.
        encoding: Options of encoding images and texts.

    Raises:
        UserError: A record cannot be used; an evaluation leaves none out.
    """
    if top < 1:
        raise UserError(f"`top`, the number of candidates to re-rank, must be at least 1, not {top}")
    loaded, saved, own_captions = open_towers(run, encoding)
    captions_of = read_captions(shards := open_split(str(data), split), captions or own_captions)
    clock = Clock(loaded.device)
    embeddings = embed_split(loaded, shards, captions_of)
    clock.stop("embed")
    tower_ranks = ranks(cosine(*embeddings[:2]), embeddings.image_of_text_T, len(shards), tie=ROUNDING)
    ranks_of, details = {"towers": tower_ranks}, {}
    clock.stop("rank")
    if rerank is not None:
        second, second_saved = (loaded, saved) if rerank == "self" else open_run(rerank, encoding)[:2]
        details["reranked_by"], match = pair_score(second_saved, rerank_by)
        texts = [text for its in captions_of for text in its]
        ranks_of["reranked"] = rerank_best(second, match, shards, texts, embeddings, tower_ranks, top)
        clock.stop("rerank")
    return Evaluation(
        scores={name: recall(*both) for name, both in ranks_of.items()},
        chance=recall_chance([len(its) for its in captions_of]),
        errors={name: recall_errors(*both, embeddings.image_of_text_T) for name, both in ranks_of.items()},
        counts={"images": len(shards), "texts": len(embeddings.text_TE), **count_shared(captions_of)},
        data=shards.url,
        weights=saved.weights.name,
        step=saved.info.get("step"),
        seconds=clock.seconds,
        details=details,
    )


def count_shared(captions_of: Sequence[Sequence[str]]) -> dict[str, int]:
    """Counts the images with a caption that another image has too. Retrieval cannot distinguish these."""
    images_with = Counter(text for its in captions_of for text in {*its})
    return {"images_with_a_caption_of_another": sum(any(images_with[text] > 1 for text in its) for its in captions_of)}


class Clock:
    """Seconds between the calls of `stop`, by name."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}
        self.last = time.perf_counter()

    def stop(self, name: str) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        self.seconds[name], self.last = round(now - self.last, 3), now


def rerank_best(
    loaded: LoadedModel,
    match: Match,
    shards: Shards,
    texts: Sequence[str],
    embeddings: SplitEmbeddings,
    tower_ranks: tuple[Tensor, Tensor],
    top: int,
) -> tuple[Tensor, Tensor]:
    """Ranks of images' captions [I] and of texts' images [T], after `match` has ordered the `top` best of each query."""
    towers, own_T = cosine(*embeddings[:2]), embeddings.image_of_text_T
    image_count, text_count = len(shards), len(texts)
    text_IN = shortlist(towers, image_count, text_count, top)
    image_TN = shortlist(transposed(towers), text_count, image_count, top)
    score_IN, score_TN = score_shortlists(text_IN, image_TN, partial(score_pairs, loaded, match, shards, texts))
    row_I = torch.arange(image_count, device=own_T.device)
    rank_I = reranked(tower_ranks[0], score_IN, own_T[text_IN] == row_I[:, None])
    return rank_I, reranked(tower_ranks[1], score_TN, image_TN == own_T[:, None])
