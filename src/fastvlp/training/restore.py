"""Reads the checkpoint of a run that is resumed, and restores its state."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import torch

from fastvlp import dist
from fastvlp.errors import UserError
from fastvlp.model.saving import load_exactly
from fastvlp.tensor_files import not_finite
from fastvlp.training.checkpoint import (
    CHECKPOINT,
    COUNTERS,
    LATER_COUNTERS,
    PARTS,
    expect_form,
    group_names,
    load_checkpoint,
)
from fastvlp.training.continuing import changed_data, changed_fields, check_names, first_batch, refuse, remeasured
from fastvlp.training.part_files import with_tensors
from fastvlp.training.state import TrainState
from fastvlp.training.train_config import TrainConfig


def read_checkpoint(run: TrainConfig, change: Collection[str] = ()) -> dict[str, Any]:
    """Reads the last checkpoint of a run; if the run is sharded, without moments and averages, which `restore` reads. Raises
    UserError if another run saved it. `change`: fields that may differ."""
    path = run.folder / CHECKPOINT
    saved = load_checkpoint(path, kinds=["pretraining"])
    if missing := {"run", "rows", "ranks", "pretraining", "optimiser", "ema", "dropped", *COUNTERS} - set(saved):
        raise UserError(f"{path}: not a checkpoint of a run, it lacks {', '.join(sorted(missing))}")
    with expect_form(path):
        changed = changed_fields(saved, run)
        allowed = check_names(run, change, saved["run"])
    refuse(path, changed, allowed)
    return saved


def restore(state: TrainState, saved: Mapping[str, Any], change: Collection[str] = ()) -> None:
    """Restores the rest of a saved state, after its weights were loaded. Raises UserError if the data had other records, or if
    the checkpoint does not contain what a run saves. `change`: fields that may differ."""
    path = state.run.folder / CHECKPOINT
    with expect_form(path):
        changed = changed_data(saved, state.run, state.contents, state.train.count)
        allowed = check_names(state.run, change, saved["run"])
    refuse(path, changed, allowed)
    with expect_form(path):
        state.changed = changed_fields(saved, state.run) | changed
        if state.division.began != saved["ranks"]:
            state.changed["ranks"] = (saved["ranks"], state.division.began)
        parameters = [p for group in state.optimiser.param_groups for p in group["params"]]
        if PARTS in saved:
            like = {f"optimiser.{i}": parameter for i, parameter in enumerate(parameters)}
            like |= {} if state.ema is None else {f"ema.{name}": x for name, x in state.ema.state_dict().items()}
            kinds = ["optimiser", *([] if state.ema is None else ["ema"])]
            divided = like if state.sharding is not None else {}
            saved = with_tensors(path.parent / saved[PARTS]["folder"], saved, kinds, divided)
        if state.ema is not None and saved["ema"] is None:
            state.ema.module.load_state_dict(state.pretraining.state_dict())
        elif state.ema is not None:
            averaged = saved["ema"]
            if state.sharding is not None:
                averaged = state.sharding.parts_of(averaged, state.ema.state_dict())
            load_exactly(state.ema, averaged, path)
        # Moments are matched to parameters by their order, because older checkpoints do not name the parameters.
        if saved.get("groups", own := group_names(state)) != own:
            raise UserError(
                f"{path}: its optimiser has other groups of parameters; `optim.head_multiplier`, `optim.cross_multiplier`, "
                f"`optim.layer_decay`, `optim.spared`, `optim.parts`, `optim.matrices` and what is trained cannot group them "
                f"otherwise in a continued run: give the values that it was saved with, or start a new run from its weights "
                f"with `init`"
            )
        moments = saved["optimiser"]
        if state.sharding is not None:
            state.sharding.part_folder = saved[PARTS]["folder"] if PARTS in saved else None
            moments = state.sharding.moments_of(moments, parameters)
        load_optimiser(state.optimiser, moments)
        state.dropped = {str(key): str(reason) for key, reason in saved["dropped"].items()} | state.dropped
        state.notes = dict(saved.get("notes", {}))
        state.earlier_length = replace(state.run, **{name: saved["run"][name] for name in ("steps", "budget_s")}).length
        for name in (*COUNTERS, *LATER_COUNTERS):
            kind, value = type(getattr(state, name)), saved.get(name, 0)
            if not isinstance(value, kind | int) or isinstance(value, bool) or not value >= 0:
                raise ValueError(f"{name} is {value!r}")
            setattr(state, name, kind(value))
        state.remeasured = remeasured(saved, state.run, state.changed)
        if state.remeasured:
            state.best, state.stale, state.validated = math.inf, 0, 0
        state.skipped_batches = first_batch(saved, state.run, state.train) - state.step * state.division.micro
    state.saved = state.step


def load_optimiser(optimiser: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Loads the moments, and the learning rate of the last step; all other settings stay those of the run. Raises ValueError if
    the moments belong to other parameters, or if a number is not finite."""
    options = [
        {name: x for name, x in group.items() if name not in ("params", "lr")} for group in optimiser.param_groups
    ]
    optimiser.load_state_dict(saved)
    for group, own in zip(optimiser.param_groups, options):
        group.update(own)
    numbers = [(name, x) for group in saved["param_groups"] for name, x in group.items() if isinstance(x, float)]
    if wrong := [name for name, x in numbers if not math.isfinite(x)]:
        raise ValueError(f"{wrong[0]} of the optimiser is not finite")
    for parameter, moments in optimiser.state.items():
        shapes = {name: x.shape for name, x in moments.items() if isinstance(x, torch.Tensor) and name != "step"}
        own = dict(zip(moments, dist.own_parts(moments.values())))
        if wrong := [name for name, shape in shapes.items() if shape != parameter.shape] or not_finite(own):
            raise ValueError(f"{wrong[0]} of the optimiser is of another shape, or not finite")
