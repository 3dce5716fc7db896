"""Validation: the losses on held-out data, by which the best weights are chosen."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import replace

import torch

from fastvlp import dist
from fastvlp.batch import Batch
from fastvlp.data.loader import Loader
from fastvlp.data.pairs import Split
from fastvlp.data.streams import with_progress
from fastvlp.training.checkpoint import save_weights
from fastvlp.training.log import RunLog
from fastvlp.training.start import make_loader
from fastvlp.training.state import TrainState, autocast


def read_before_training(state: TrainState, scored: Collection[Split] = ()) -> None:
    """Reads the validation data once, and the splits that are `scored` later, and runs the model on a validation batch, so
    that what is wrong with them is found before the run spends its time. Raises UserError."""
    with dist.together(state.device):
        if state.val is not None and (batch := first_batch(state.val, "val")) is not None:
            losses_of(state, [batch])
        for split in scored:
            data, size = replace(state.run.data, cache=False), state.model.config.image.size
            rows = data.rows(split, state.tokenizer, size, strict=True) if split != "val" else None
            if rows is not None:
                first_batch(make_loader(state.run, rows), split)


def first_batch(loader: Loader, split: Split) -> Batch | None:
    """The first batch of a split, after all have been read; None where this rank has no rows."""
    first = None
    count = -(-len(range(loader.rank, loader.count, loader.world)) // loader.batch_size)
    for batch, _ in with_progress(loader.once(), lambda: count, f"reading {split} once", dist.is_main()):
        first = batch if first is None else first
    return first


def validate(state: TrainState) -> dict[str, float]:
    """Returns the mean of each loss over the validation targets, and `loss`, their weighted sum. Random draws are the same
    every time."""
    if state.val is None:
        return {}
    everyone = dist.gather_objects(losses_of(state, (batch for batch, _ in state.val.once())))
    means: dict[str, float] = {}
    loss = 0.0
    for name in dict.fromkeys(name for part in everyone for name in part):
        totals, counts, weights = zip(*(part[name] for part in everyone if name in part))
        means[name] = sum(totals) / max(sum(counts), 1)
        loss += weights[0] * means[name]
    return {"loss": loss} | means


@torch.no_grad()
def losses_of(state: TrainState, batches: Iterable[Batch]) -> dict[str, tuple[float, float, float]]:
    """Total, count and weight of each loss over the batches of this rank."""
    module, training = state.evaluated, state.evaluated.training
    module.eval()
    sums: dict[str, tuple[float, float, float]] = {}
    try:
        for batch in batches:
            with autocast(state):
                losses = module(batch.to(state.device))
            for name, term in losses.items():
                total, count, _ = sums.get(name, (0.0, 0.0, 0.0))
                sums[name] = (total + float(term.total), count + float(term.count), term.weight)
    finally:
        module.train(training)
    return sums


def validate_and_keep_best(state: TrainState, log: RunLog) -> None:
    """Validates, and saves the weights if their loss is the lowest so far."""
    losses = validate(state)
    if not losses:
        return
    log.event("validation", step=state.step, elapsed=state.elapsed, losses=losses)
    # A resumed run may validate after the same step again.
    state.stale += state.validated != state.step
    state.validated = state.step
    if losses["loss"] < state.best:
        state.best, state.stale = losses["loss"], 0
        if dist.is_main():
            save_weights(state, "best", validation=losses)
