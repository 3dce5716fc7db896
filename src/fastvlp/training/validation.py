"""Validation: computes the losses on held-out data, by which the best weights are chosen."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from fastvlp import dist
from fastvlp.batch import Batch
from fastvlp.data.loader import Loader
from fastvlp.data.pairs import Split
from fastvlp.data.streams import with_progress
from fastvlp.objectives.objective import Loss, PairObjective
from fastvlp.training.checkpoint import evaluated_whole, save_weights
from fastvlp.training.log import RunLog
from fastvlp.training.start import make_loader
from fastvlp.training.state import TrainState, autocast

# Number of rows of a validation batch if an objective takes a row's negatives from its batch.
NEGATIVES_AMONG = 32

# Total, count and weight of losses by name.
Sums = dict[str, tuple[float, float, float]]


def read_before_training(state: TrainState, scored: Collection[Split] = ()) -> None:
    """Reads the validation data and the splits that are `scored` later once, and runs the model on a validation batch, so that
    faults are found before training. Raises UserError for a fault."""
    with dist.together(state.device):
        if state.val is not None and (batch := first_batch(state.val, "val")) is not None:
            losses_of(state, [batch])
        for split in scored:
            data, size = replace(state.run.data, cache=False), state.model.config.image.size
            rows = data.rows(split, state.tokenizer, size, strict=True) if split != "val" else None
            if rows is not None:
                first_batch(make_loader(state.run, rows), split)


def first_batch(loader: Loader, split: Split) -> Batch | None:
    """Reads all batches of a split, and returns the first one; None if this rank has no rows."""
    first = None
    count = -(-len(range(loader.rank, loader.count, loader.world)) // loader.batch_size)
    for batch, _ in with_progress(loader.once(), lambda: count, f"reading {split} once", dist.is_main()):
        first = batch if first is None else first
    return first


def validation_batches(state: TrainState) -> Iterator[Batch]:
    """Returns the loader of this rank's validation rows. If an objective takes a row's negatives from its batch, batches have a
    fixed number of rows, so that the loss does not depend on the batch size of training."""
    assert state.val is not None
    parts = state.pretraining.all_objectives().values()
    negatives = any(part.contrasts and not isinstance(part, PairObjective) for part in parts)
    for batch, _ in state.val.once(NEGATIVES_AMONG if negatives else None):
        yield batch


def validate(state: TrainState) -> dict[str, float]:
    """Returns the mean of each loss over the validation targets, and `loss`, their weighted sum; nothing if there is no
    target. Random draws are the same every time.

    Pair objectives score `validation_rows` rows together, whatever the batch size and the number of ranks.
    """
    if state.val is None:
        return {}
    everyone = dist.gather_objects(losses_of(state, validation_batches(state), state.val.count))
    means: dict[str, float] = {}
    loss = 0.0
    for name in dict.fromkeys(name for part in everyone for name in part):
        totals, counts, weights = zip(*(part[name] for part in everyone if name in part))
        if sum(counts):
            means[name] = sum(totals) / sum(counts)
            loss += weights[0] * means[name]
    return {"loss": loss} | means if means else {}


@torch.no_grad()
def losses_of(state: TrainState, batches: Iterable[Batch], count: int | None = None) -> Sums:
    """Sums each loss over the batches of this rank: its total, count and weight.

    count: number of rows of all ranks, which then score the pair objectives together; None leaves these out.
    """
    module, training = state.evaluated, state.evaluated.training
    module.eval()
    sums: Sums = {}
    parts: dict[str, list[tuple[Tensor, ...]]] = {name: [] for name in module.pair_objectives()}
    try:
        for batch in batches:
            with autocast(state):
                losses, embedded = module.validation(batch.to(state.device))
            add(sums, losses)
            for name, rows in embedded.items():
                parts[name].append(tuple(x.cpu() for x in rows))
        if count is not None:
            for name, tensors in parts.items():
                score_together(state, name, [torch.cat(rows) for rows in zip(*tensors)], count, sums)
    finally:
        module.train(training)
    return sums


def score_together(state: TrainState, name: str, rows: list[Tensor], count: int, sums: Sums) -> None:
    """Adds the losses of a pair objective. `rows`: the tensors of this rank. The rows of all ranks are divided into equal parts
    of about `validation_rows`, and each rank scores some of the parts."""
    objective = state.evaluated.pair_objectives()[name]
    index = torch.arange(dist.rank(), count, dist.world())
    number = max(1, round(count / state.run.validation_rows))
    for part in range(number):
        own = [x[index % number == part] for x in rows]
        everyone = [tensors for tensors in dist.gather_objects(own) if tensors]
        if part % dist.world() != dist.rank():
            continue
        gathered = [torch.cat(tensors).to(state.device) for tensors in zip(*everyone)]
        if len(gathered[0]) > 1:
            with autocast(state):
                losses = objective.score(*gathered)
            add(sums, {f"{name}/{term}": loss for term, loss in losses.items()})


def add(sums: Sums, losses: Mapping[str, Loss]) -> None:
    for name, term in losses.items():
        total, count, _ = sums.get(name, (0.0, 0.0, 0.0))
        sums[name] = (total + float(term.total), count + float(term.count), term.weight)


def validate_and_keep_best(state: TrainState, log: RunLog) -> None:
    """Validates, and saves the weights if their loss is the lowest so far."""
    losses = validate(state)
    if not losses:
        if state.val is not None:
            log.say(
                f"no validation: there is nothing to tell apart among {state.val.count} rows; give more in `data.val`"
            )
        return
    log.event("validation", step=state.step, elapsed=state.elapsed, losses=losses)
    # A resumed run may validate after the same step again.
    state.stale += state.validated != state.step
    state.validated = state.step
    if losses["loss"] < state.best:
        state.best, state.stale = losses["loss"], 0
        whole = evaluated_whole(state)
        with dist.together(state.device):
            if whole is not None and dist.is_main():
                save_weights(state, "best", whole, validation=losses)
