"""Image-text retrieval of a run on a split: two towers rank everything, and a model that reads both may rank the best
once more."""

from __future__ import annotations

import time
from collections import Counter
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastvlp.data.records.shards import Shards
from fastvlp.errors import UserError
from fastvlp.eval.embedding import Embedded, Reader, embed_split, open_run, open_split, open_towers, read_captions
from fastvlp.eval.options import Retrieval
from fastvlp.eval.pair_scores import pair_score
from fastvlp.eval.ranks import ROUNDING, cosine, ranks, recall, rerank, reranked, shortlist, transposed
from fastvlp.eval.rerank import score_pairs
from fastvlp.model.saving import Saved


def evaluate(told: Retrieval) -> dict[str, Any]:
    """`scores` of the towers and, with --rerank, of both stages; seconds of each. Raises UserError for a record that
    cannot be used: an evaluation leaves none out."""
    if told.top < 1:
        raise UserError(f"--top {told.top}: score at least one candidate of each query once more")
    reader, saved, data = open_towers(told)
    shards = open_split(told)
    captions = read_captions(shards, told.captions or data.captions)
    clock = Clock(reader.device)
    found = embed_split(reader, shards, captions)
    clock.stop("embed")
    rank = ranks(cosine(*found[:2]), found.image_of_text_T, len(shards), tie=ROUNDING)
    scores = {"towers": recall(*rank)}
    clock.stop("rank")
    about: dict[str, Any] = {"data": shards.url, "weights": saved.weights.name, "step": saved.info.get("step")}
    if told.rerank is not None:
        second = (reader, saved) if told.rerank == "self" else open_run(told, told.rerank)[:2]
        about["reranked_by"], new_rank = second_stage(*second, told, shards, captions, found, rank)
        scores["reranked"] = recall(*new_rank)
        clock.stop("rerank")
    texts = Counter(text for its in captions for text in {*its})
    shared = sum(any(texts[text] > 1 for text in its) for its in captions)
    counts = {"images": len(shards), "texts": len(found.text_TE), "images_with_a_caption_of_another": shared}
    return {"scores": scores, "counts": counts, "seconds": clock.seconds, **about}


class Clock:
    """Seconds between stops, by name."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}
        self.last = time.perf_counter()

    def stop(self, name: str) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        self.seconds[name], self.last = round(now - self.last, 3), now


def second_stage(
    reader: Reader,
    saved: Saved,
    told: Retrieval,
    shards: Shards,
    captions: list[list[str]],
    found: Embedded,
    rank: tuple[Tensor, Tensor],
) -> tuple[str, tuple[Tensor, Tensor]]:
    """What scored the pairs, and both directions' ranks after each query's `told.top` best were put in their order."""
    name, match = pair_score(saved, told.rerank_by)
    images, texts = len(shards), len(found.text_TE)
    towers, own_T = cosine(*found[:2]), found.image_of_text_T
    text_IN = shortlist(towers, images, texts, told.top)
    image_TN = shortlist(transposed(towers), texts, images, told.top)
    said = [text for its in captions for text in its]
    score_IN, score_TN = rerank(text_IN, image_TN, partial(score_pairs, reader, match, shards, said))
    row_I = torch.arange(images, device=own_T.device)
    rank_I = reranked(rank[0], score_IN, own_T[text_IN] == row_I[:, None])
    return name, (rank_I, reranked(rank[1], score_TN, image_TN == own_T[:, None]))
