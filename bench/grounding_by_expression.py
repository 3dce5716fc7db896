"""Measure what a single-stream model keeps of region positions, and what words alone say about the corpus's rationales.

    # how much the embedded boxes vary: squared mean and variance
    python bench/grounding_by_expression.py runs/uniter_demo runs/fresh
    # besides that, grounding accuracy by what an expression says
    python bench/grounding_by_expression.py runs/uniter_demo-grounding --data demo/world/test
    # accuracy of rationales chosen without the picture
    python bench/grounding_by_expression.py --data demo/world/test

The boxes are 2,000 random ones, taken after the norm of their embedding. An expression counts as relation, place, size or
attributes alone, by its words. A rationale is chosen at random among those whose first words name the right answer. Each
command takes under a minute on one core.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from statistics import mean
from typing import Annotated

import torch
import tyro

from fastvlp.data.records.shards import Shards
from fastvlp.model.freezing import evaluating
from fastvlp.model.model import VLModel
from fastvlp.model.region_embedding import box_vector, require_regions
from fastvlp.model.saving import load_model
from fastvlp.tasks.grounding import RIGHT_OVERLAP, overlap
from fastvlp.tasks.heads import image_states, target_of
from fastvlp.tasks.items import batches_in_order
from fastvlp.tasks.task_evaluation import load_task

# What an expression says, by the first pattern that is found in it.
PATTERNS = {
    "relation": r"(left|right) of|above|below|under|over|beside|higher|lower|next",
    "place": r"left|right|top|bottom|middle|cent",
    "size": r"big|small|medium|large|tiny|little|huge",
    "attributes": "",
}


@dataclass(frozen=True, kw_only=True)
class Options:
    runs: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Folders of runs over regions; with `data`, fine-tuned on grounding."""
    data: str | None = None
    """A split: expressions for the runs, or rationales where no run is given."""


def spread(model: VLModel) -> tuple[float, float]:
    """Squared mean and variance of the embedded boxes, after their norm: what all boxes share, and how they differ."""
    draw = torch.Generator().manual_seed(0)
    low, size = torch.rand(2000, 2, generator=draw) * 0.75, 0.08 + torch.rand(2000, 2, generator=draw) * 0.2
    assert model.single is not None
    regions = model.single.regions
    with torch.no_grad():
        place = regions.box_norm(regions.box(box_vector(torch.cat([low, (low + size).clamp(max=1)], -1))))
    return place.mean(0).square().mean().item(), place.var(0).mean().item()


def grounded(run: str, data: str) -> dict[str, list[bool]]:
    """Whether the model finds the region of each expression of the split `data`, by what the expression says."""
    tuned = load_task(run)
    tuned = tuned._replace(data=replace(tuned.data, test=data))
    model, objective, items = tuned.saved.model, tuned.objective, tuned.items("test")
    hits: list[bool] = []
    with evaluating(model, objective):
        for batch in batches_in_order(items, 64, "cpu"):
            scores, regions = objective.scores(model, image_states(model, batch), batch), require_regions(batch.regions)
            fits = (overlap(regions.box, target_of(batch)[:, None]) > RIGHT_OVERLAP) & regions.mask
            hits += fits.gather(1, scores.argmax(1, keepdim=True))[:, 0].tolist()
    by_pattern: dict[str, list[bool]] = defaultdict(list)
    for item, hit in zip(items.items, hits, strict=True):
        by_pattern[next(name for name, words in PATTERNS.items() if re.search(words, item.text))].append(hit)
    return by_pattern


def chances_by_words(data: str) -> Iterator[float]:
    """For each question, the chance that a random one of the rationales that name the right answer first is the right one."""
    shards = Shards(data)
    for i in range(len(shards)):
        for choice in shards.info(i).get("choices", []):
            answer, texts = choice["answers"][choice["right"]], choice["rationales"]
            naming = [k for k, text in enumerate(texts) if answer in text.split(" is ")[0]]
            yield (choice["right_rationale"] in naming) / len(naming or texts)


def main(o: Options) -> None:
    for run in o.runs:
        print(f"{run}: embedded boxes: squared mean {{:.2f}}, variance {{:.2f}}".format(*spread(load_model(run).model)))
        if o.data:
            parts = grounded(run, o.data).items()
            print(f"{run}: " + ", ".join(f"{name} {100 * mean(hits):.1f} % of {len(hits)}" for name, hits in parts))
    if o.data and not o.runs:
        chances = [*chances_by_words(o.data)]
        print(f"{o.data}: a rationale chosen by words alone: {100 * mean(chances):.1f} % of {len(chances)}")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
