"""Divides the batches of a step among the ranks. A run that continues on another number of ranks keeps its steps: each has the
same rows, in batches that were planned for the ranks on which the run began."""

from __future__ import annotations

from typing import NamedTuple

from fastvlp import dist
from fastvlp.errors import UserError
from fastvlp.training.train_config import TrainConfig


class Division(NamedTuple):
    """The share that each rank has of a step.

    Attributes:
        began: number of ranks on which the run began, for which its batches are planned.
        micro: number of micro-batches of a step on each rank.
        cut: number of equal parts of a planned batch; each part is a micro-batch.
    """

    began: int
    micro: int
    cut: int = 1


def divide(run: TrainConfig, began: int, ranks: int | None = None) -> Division:
    """Divides the steps of a run among `ranks`, by default the present ones.

    Micro-batches stay whole if their number can be divided by the ranks; otherwise each is cut into as few equal parts as
    possible.

    Raises UserError if the ranks cannot have equal shares.
    """
    ranks = dist.world() if ranks is None else ranks
    planned, rows = run.accumulate * began, run.data.batch_size
    cuts = [1] if run.data.max_tokens is not None else [cut for cut in range(1, ranks + 1) if rows % cut == 0]
    for cut in cuts:
        if planned * cut % ranks == 0:
            return Division(began, planned * cut // ranks, cut)
    size = f"up to {run.data.max_tokens} tokens" if run.data.max_tokens is not None else f"{rows} rows"
    raise UserError(
        f"{run.name}: began on {began} ranks, so that a step has {planned} micro-batches of {size}, and {ranks} ranks cannot "
        f"share them equally; continue on a number of ranks that divides {planned * max(cuts) if len(cuts) > 1 else planned}, "
        f"or name `ranks` in `change`: then each rank has {run.accumulate} in a step, and the steps have other rows"
    )
