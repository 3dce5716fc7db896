"""Starts a run: prepares its data, model and optimiser and, if it is resumed, loads its last checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fastvlp import dist
from fastvlp.batch import Batch
from fastvlp.convert.public_encoders import PublicImages, PublicTexts
from fastvlp.data.loader import Loader, Row
from fastvlp.data.pairs import Rows
from fastvlp.data.stores import Stored
from fastvlp.data.tokenize import Tokenizer
from fastvlp.dist import Precision, pick_device, pick_precision
from fastvlp.errors import UserError
from fastvlp.model.inherited_config import inheritable_weights
from fastvlp.model.lora import add_adapters
from fastvlp.model.model import VLModel
from fastvlp.model.saved_run import read_saved_run
from fastvlp.model.saving import Inheritance, inherit, inherit_objectives, load_exactly, load_model, read_config
from fastvlp.model.sizes import with_tokenizer
from fastvlp.random import hash64
from fastvlp.training.blocks import compile_blocks, recompute_blocks
from fastvlp.training.checkpoint import CHECKPOINT
from fastvlp.training.continuing import check_names
from fastvlp.training.division import Division, divide
from fastvlp.training.encoder_checks import check_encoders
from fastvlp.training.flops import FlopCounter
from fastvlp.training.optim import build_optimiser
from fastvlp.training.pretraining import Pretraining
from fastvlp.training.public_start import check_tokens, completed, load_encoders, public_tokenizer, read_encoders
from fastvlp.training.restore import read_checkpoint, restore
from fastvlp.training.state import TrainState
from fastvlp.training.stored_inputs import stored_inputs
from fastvlp.training.train_config import TrainConfig, check
from fastvlp.training.trained_parts import freeze

if TYPE_CHECKING:
    from fastvlp.training.sharding import Sharding

# No cluster has more ranks: a checkpoint that states more is damaged.
MOST_RANKS = 1 << 20


def start(run: TrainConfig, *, resume: bool = False, change: Collection[str] = ()) -> TrainState:
    """Returns everything that the loop needs. With `resume` it is loaded from the run's last checkpoint, if there is one.
    `change`: names of the fields that may differ from the saved run.

    Raises UserError if the config, the data or the checkpoint cannot be used.
    """
    images, texts = read_encoders(run)
    run = with_one_teacher(completed(run, images, texts))
    check(run)
    if run.threads:
        torch.set_num_threads(run.threads)
    device, again = pick_device(run.device), resume and (run.folder / CHECKPOINT).exists()
    if not again:
        check_names(run, change)
    precision = run_precision(run, device, again)
    run = replace(run, precision=precision)
    tokenizer = find_tokenizer(run, again, texts)
    pretraining, inherited = make_pretraining(run, tokenizer, images, texts)
    pretraining.to(device)
    check_encoders(pretraining.model)
    model, size = pretraining.model, pretraining.model.config.image.size
    saved = read_checkpoint(run, change) if again else None
    if saved is not None:
        load_exactly(pretraining, saved["pretraining"], run.folder / CHECKPOINT)
    division = divide(run, began_ranks(run, saved, change))
    # The weights must be loaded before, because stored states belong to one encoder.
    stored = stored_inputs(pretraining, run, precision, division.began)
    some = stored is not None and any((stored.images, stored.texts, stored.teacher))
    given: dict[str, Any] = {"stored": stored} if some else {}
    rows = run.data.rows("train", tokenizer, size, strict=False, **given)
    if rows is None:
        raise UserError(f"{run.name}: the data has no training split; name its folder in `data.train`")
    for objective in pretraining.all_objectives().values():
        objective.check(samples(rows))
    # The checks must run before, because they fill buffers that are not saved.
    ema = AveragedModel(pretraining, multi_avg_fn=averaging(run.ema)) if run.ema is not None else None
    held_out = held_out_rows(run, tokenizer, size, given)
    sharding = sharded(run, pretraining, ema)
    state = TrainState(
        run=with_teacher_time(run, stored),
        device=device,
        tokenizer=tokenizer,
        model=model,
        pretraining=pretraining,
        wrapped=pretraining,
        optimiser=build_optimiser(pretraining, run.optim),
        ema=ema,
        division=division,
        sharding=sharding,
        train=make_loader(run, rows, division, hashed=pretraining.contrasts),
        val=None if held_out is None else make_loader(run, held_out, hashed=pretraining.contrasts),
        dropped={part.key: part.reason for part in rows.damage},
        inherited=inherited,
        stored=stored,
        contents={"train": rows.content, "val": None if held_out is None else held_out.content},
        flops=FlopCounter(model.config.image.tokens),
    )
    if saved is not None:
        restore(state, saved, change)
    return prepared(state)


def prepared(state: TrainState) -> TrainState:
    """Applies the options of the run that recompute blocks, compile them and group texts, and wraps the module for several
    ranks."""
    state.model.group_texts = state.run.group_texts
    if state.run.recompute:
        state.recomputes = recompute_blocks(state.model)
    if state.run.compile:
        compile_blocks(state.pretraining, state.device)
    if dist.world() > 1 and state.sharding is None:
        state.wrapped = distributed(state.run, state.pretraining)
    return state


def began_ranks(run: TrainConfig, saved: Mapping[str, Any] | None, change: Collection[str]) -> int:
    """Returns the number of ranks for which the steps of a run are planned: the number on which it began, or the present number
    if the user allows `ranks` to differ."""
    if saved is None or "ranks" in change:
        return dist.world()
    began = saved["ranks"]
    if not isinstance(began, int) or not 1 <= began <= MOST_RANKS:
        raise UserError(
            f"{run.folder / CHECKPOINT}: not what a run saves (`ranks` is {began!r}); restore the file or start the run anew"
        )
    return began


def with_one_teacher(run: TrainConfig) -> TrainConfig:
    """Returns the run with the teacher that it names, if any, in all of its objectives."""
    if run.teacher is None:
        return run
    return replace(run, objectives={name: own.with_teacher(run.teacher) for name, own in run.objectives.items()})


def with_teacher_time(run: TrainConfig, stored: Stored | None) -> TrainConfig:
    """If the teacher's time counts, returns the run with the rest of its budget. Raises UserError if nothing is left."""
    if run.teacher_time == "free" or stored is None or stored.teacher is None:
        return run
    # All ranks use the same value, so that they end after the same step.
    took = dist.gather_objects(stored.teacher.seconds)[0]
    if run.budget_s is None or run.budget_s <= took:
        length = "ends after steps" if run.budget_s is None else f"has {run.budget_s:g} s"
        raise UserError(
            f"{run.name}: `teacher_time` is counted, the teacher took {took:.0f} s, and the run {length}; give more "
            "`budget_s`, or set `teacher_time` to free"
        )
    return replace(run, budget_s=run.budget_s - took)


def held_out_rows(run: TrainConfig, tokenizer: Tokenizer, size: int, given: Mapping[str, Any]) -> Rows | None:
    """Returns the rows to validate on; None if there are none. Raises UserError if there are none and the run needs them."""
    rows = run.data.rows("val", tokenizer, size, strict=True, **given)
    if rows is None and run.patience is not None:
        raise UserError(f"{run.name}: `patience` counts validations, which need data; give `data.val`, or leave it out")
    return rows


def averaging(decay: float) -> Callable[..., None]:
    """Returns the function that updates the averaged weights: of each rank's own part, if the weights are divided."""
    average = get_ema_multi_avg_fn(decay)
    return lambda own, current, count: average(dist.own_parts(own), dist.own_parts(current), count)


def sharded(run: TrainConfig, pretraining: Pretraining, ema: AveragedModel | None) -> Sharding | None:
    """Divides the weights of a run, and their average, among the ranks, if `shard` is set and there are several ranks. The
    states of frozen encoders must be stored before, since the encoders run on their own for this."""
    if not run.shard or dist.world() == 1:
        return None
    # Imported only here, because it takes as long to import as the rest of PyTorch.
    from fastvlp.training.sharding import Sharding

    device = pick_device(run.device)
    sharding = Sharding(pretraining, device)
    if ema is not None:
        sharding.divide(cast(Pretraining, ema.module), device)
    return sharding


def distributed(run: TrainConfig, pretraining: Pretraining) -> nn.Module:
    return nn.parallel.DistributedDataParallel(
        pretraining,
        # If a step leaves a parameter unused, DDP without this search raises an error in the next step. If none is ever unused,
        # the search prints a warning.
        find_unused_parameters=run.mix is not None or not pretraining.uses_all(),
        # Each buffer is computed from gathered rows, so it is the same on every rank.
        broadcast_buffers=False,
    )


def run_precision(run: TrainConfig, device: torch.device, resume: bool) -> Precision:
    """Returns the precision of a run. `auto` means the one that the device computes fast; a resumed run keeps its precision."""
    if resume and run.precision == "auto":
        return read_saved_run(run.folder).precision
    return pick_precision(run.precision, device)


def samples(rows: Rows, most: int = 1000) -> Iterator[Batch]:
    """Yields at most `most` readable rows, spread evenly over the data, each as a batch of its own."""
    for i in range(0, rows.count, -(-rows.count // most)):
        batch, _ = rows.make([Row(i, hash64(i))])
        if len(batch):
            yield batch


def make_pretraining(
    run: TrainConfig, tokenizer: Tokenizer, images: PublicImages | None = None, texts: PublicTexts | None = None
) -> tuple[Pretraining, Inheritance | None]:
    """Returns the model and the objectives, with weights drawn from the run's seed or inherited."""
    config, inherited, new_tokens = with_tokenizer(run.model, tokenizer), None, list(tokenizer.added)
    torch.manual_seed(hash64(run.seed))
    model = VLModel(config)
    objectives = {name: objective.build(config, tokenizer) for name, objective in run.objectives.items()}
    if run.init is not None:
        source = load_model(run.init)
        inherited = inherit(model, inheritable_weights(source, config), source.weights)
        inherit_objectives(objectives, source.objectives, inherited)
        new_tokens += source.info.get("untrained_tokens", [])
    else:
        inherited = load_encoders(model, objectives, images, texts)
    freeze(model, run.freeze, run.train_last)
    add_adapters(model, run.lora)
    check_tokens(model, objectives, new_tokens)
    for objective in objectives.values():
        objective.begin(model)
    shares: dict[str, Any] = {"keep_states": run.keep_states, "masked_validation": run.masked_validation}
    return Pretraining(model, objectives, run.keep, **shares), inherited


def find_tokenizer(run: TrainConfig, resume: bool, texts: PublicTexts | None = None) -> Tokenizer:
    """Returns the tokenizer of a run: that of the checkpoint that it is resumed from, that of a public text encoder, the
    named one, that of the weights to start from, or one trained on the texts of the data."""
    own = run.folder / "tokenizer.json"
    if resume and own.exists():
        return Tokenizer.load(own)
    if texts is not None:
        words = public_tokenizer(texts, run.tokenizer)
        return words if run.text_prefix is None else words.with_prefix(run.text_prefix)
    if run.tokenizer is not None:
        return Tokenizer.load(run.tokenizer)
    if run.init is not None and read_config(run.init).text.present:
        return Tokenizer.load(Path(run.init) / "tokenizer.json")
    return Tokenizer.train(run.data.texts(), "wordpiece", vocab_size=run.vocab)


def make_loader(run: TrainConfig, rows: Rows, division: Division | None = None, *, hashed: bool = False) -> Loader:
    """Returns the loader of some rows. `division`: how steps of training are divided; None for validation. `hashed`: whether an
    objective contrasts rows; batches then have `content`, if the data can make it."""
    return Loader(
        rows.count,
        (rows.make_hashed if hashed else None) or rows.make,
        batch_size=run.data.batch_size,
        seed=run.seed,
        rank=dist.rank(),
        world=dist.world(),
        workers=run.data.workers,
        pin=pick_device(run.device).type == "cuda",
        grouping=run.data.grouping,
        lengths=rows.lengths,
        reading=rows.reading,
        planned_for=None if division is None else division.began,
        cut=1 if division is None else division.cut,
        mixture=rows.mixture,
    )
