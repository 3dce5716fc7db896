"""Gradient caching computes losses of pair objectives over more rows than fit in memory at once (GradCache, arXiv 2101.06983).

Every micro-batch is embedded without gradients, the whole step is scored once, and the gradients of the embeddings are kept.
Each micro-batch is then embedded again, and its part of these gradients is passed back through the model. All gradients, also
that of the temperature, equal those of one large batch. This holds with random masking too, since its draws are functions of
the rows' seeds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from fastvlp.batch import Batch
from fastvlp.objectives.objective import Loss, combine
from fastvlp.training.flops import FlopCounter, Shape
from fastvlp.training.pretraining import Embedded, Pretraining, RowGrads


class Cached(NamedTuple):
    """The result of scoring a step. `losses`: of the whole step, without gradients. `grads`: of each micro-batch, by
    objective."""

    losses: dict[str, Loss]
    grads: list[dict[str, RowGrads]]


def cache_gradients(
    pretraining: Pretraining,
    micro: Sequence[Batch],
    counts: Mapping[str, Tensor],
    seeded: Callable[[int], AbstractContextManager[None]],
    flops: FlopCounter | None = None,
) -> Cached:
    """Scores all micro-batches of this rank together. `seeded(i)`: the context in which micro-batch i runs, with the seed of
    dropout; it must be the same as in the pass with gradients. `flops` counts everything except the embedding, which that pass
    computes again."""
    counting = flops.counting if flops is not None else lambda shape: nullcontext()
    objectives = pretraining.pair_objectives()
    embedded: list[dict[str, Embedded]] = []
    for i, batch in enumerate(micro):
        around = lambda name, batch=batch: counting(Shape.of(f"{name}/constants", batch))  # noqa: E731
        with torch.no_grad(), seeded(i):
            embedded.append(pretraining.embedded(batch, around))

    losses: dict[str, Loss] = {}
    grads: list[dict[str, RowGrads]] = [{} for _ in micro]
    for name, objective in objectives.items():
        rows = [torch.cat(parts).requires_grad_() for parts in zip(*(part[name].rows for part in embedded))]
        constants = [torch.cat(parts) for parts in zip(*(part[name].constants for part in embedded))]
        learned = [p for p in objective.parameters() if p.requires_grad]
        with counting(Shape(f"{name}/score", len(rows[0]))):
            scored = objective.score(*rows, *constants)
            terms = {f"{name}/{term}": loss for term, loss in scored.items()}
            gradient = torch.autograd.grad(combine(terms, counts), [*rows, *learned], allow_unused=True)
        of_rows = [torch.zeros_like(x) if g is None else g for x, g in zip(rows, gradient)]
        split = zip(*(g.split([len(batch) for batch in micro]) for g in of_rows))
        # The gradient of the objective's own parameters is given to only one micro-batch.
        own = (gradient[len(rows) :], *((None,) * len(learned) for _ in micro[1:]))
        for i, (parts, parameters) in enumerate(zip(split, own)):
            grads[i][name] = RowGrads(parts, parameters)
        losses |= {term: Loss(loss.total.detach(), loss.count, loss.weight) for term, loss in terms.items()}
    return Cached(losses, grads)
