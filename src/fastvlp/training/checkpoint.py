"""Saves a run in its folder: its whole state in one file, the weights, and its config.

A file is written whole or not at all.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from fastvlp import dist
from fastvlp.config import Json, to_json
from fastvlp.errors import UserError
from fastvlp.files import whole_file, write_whole
from fastvlp.model.frozen_states import frozen_encoders
from fastvlp.model.lora import save_adapters
from fastvlp.model.saving import load_exactly, save_model
from fastvlp.objectives.objective import Ability
from fastvlp.objectives.saved_objectives import describe
from fastvlp.plain_json import with_checksum
from fastvlp.provenance import about
from fastvlp.tensor_files import check_torch_file, not_finite
from fastvlp.training.continuing import changed_data, changed_fields, check_names, first_batch, refuse, remeasured
from fastvlp.training.pretraining import Pretraining
from fastvlp.training.run_folder import check_in_place
from fastvlp.training.state import TrainState
from fastvlp.training.train_config import TrainConfig

CHECKPOINT = "last.pt"
# Fields of the state that are saved and restored as they are.
COUNTERS = ("step", "elapsed", "pairs", "tokens", "bad_steps", "skipped", "best")
# Those that older checkpoints lack: 0 there.
LATER_COUNTERS = ("stale", "validated")


def save_checkpoint(path: str | Path, state: dict[str, Any]) -> None:
    """Tensors, numbers, strings and their containers only: the file is read back without running anything in it.

    Raises UserError if the disk is full or the folder not writable; an older file then stays as it was.
    """
    path = Path(path)
    # Always the same name, so that what a killed run leaves behind is overwritten by the next.
    with whole_file(path, f"{path.name}.tmp") as part, part.open("wb") as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:
            # The zip writer goes on after a failed write, and then raises a RuntimeError about its position.
            cause = error.__context__
            reason = (cause.errno, cause.strerror) if isinstance(cause, OSError) else (None, str(error).splitlines()[0])
            raise OSError(*reason) from error


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """The saved state on the CPU, whatever device it was saved from. Raises UserError if the file is missing, or is not what
    was written."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no checkpoint here; give the folder of a run that has saved one")
    try:
        check_torch_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    # Given hostile bytes, torch raises anything.
    except Exception as error:
        # Torch goes on with advice, such as to load the file without its safeguard.
        cause = re.split(r"\.\s|\n", str(error))[0] or type(error).__name__
        raise UserError(
            f"{path}: not a readable checkpoint ({cause}); restore the file or start the run anew"
        ) from error
    if not isinstance(state, dict):
        raise UserError(f"{path}: not a checkpoint of a run, it holds a {type(state).__name__}")
    return state


def save(state: TrainState, *, wait: bool = True) -> None:
    """Everything that `restore` needs, and the weights alone beside it. The main rank writes, and the others `wait` for it:
    what it cannot write is an error of all.

    Raises UserError if a weight is not finite, so that what was saved before stays, where the folder was removed, and where
    the disk is full.
    """
    if state.sharding is not None and not wait:
        # The weights of a rank that has ended are lost.
        return
    with dist.together(state.device) if wait else nullcontext():
        check_finite(state)
    whole = gather(state)
    with dist.together(state.device) if wait else nullcontext():
        write_state(state, whole)
    if wait:
        state.saved = state.step


class Whole(NamedTuple):
    """The weights and optimiser state of a run, gathered from all ranks, as they are saved.

    Attributes:
        pretraining, optimiser, ema: their states.
        evaluated: the module whose weights are validated.
    """

    pretraining: dict[str, Tensor]
    optimiser: dict[str, Any]
    ema: dict[str, Tensor] | None
    evaluated: Pretraining


def evaluated_whole(state: TrainState) -> Pretraining | None:
    """The module that is validated, with whole weights; None on all ranks but the main one where they are divided."""
    return state.evaluated if state.sharding is None else state.sharding.whole(state.evaluated)[0]


def gather(state: TrainState) -> Whole | None:
    """The weights of a run as they are saved; None on all ranks but the main one where they are divided."""
    ema = None if state.ema is None else state.ema.state_dict()
    if state.sharding is None:
        return Whole(state.pretraining.state_dict(), state.optimiser.state_dict(), ema, state.evaluated)
    evaluated, weights = state.sharding.whole(state.evaluated)
    optimiser = state.sharding.gathered(state.optimiser.state_dict())
    if ema is not None:
        # The averages are in memory already.
        ema = {name: weights.get(name.removeprefix("module."), x) for name, x in ema.items()}
        weights = state.sharding.gathered(state.pretraining.state_dict())
    return None if evaluated is None else Whole(weights, optimiser, ema, evaluated)


def write_state(state: TrainState, whole: Whole | None) -> None:
    """Writes what is saved of a run, on the main rank alone."""
    if dist.is_main() and whole is not None:
        check_in_place(state.lock)
        saved: dict[str, Any] = {name: getattr(state, name) for name in (*COUNTERS, *LATER_COUNTERS)} | {
            "dropped": state.dropped,
            "notes": state.notes,
            "run": to_json(state.run),
            "rows": state.train.count,
            "contents": state.contents,
            # Of each of the ranks on which the run began.
            "batches": state.train.planned(state.batches),
            "places": state.train.place(state.batches),
            "ranks": state.division.began,
            "pretraining": whole.pretraining,
            "optimiser": whole.optimiser,
            "groups": group_names(state),
            "ema": whole.ema,
        }
        save_checkpoint(state.run.folder / CHECKPOINT, saved)
        save_weights(state, "last", whole.evaluated)
        state.saved = state.step


def check_finite(state: TrainState) -> None:
    """Raises UserError, on every rank, where a weight is NaN or infinite."""
    module = state.pretraining
    weights = module.state_dict()
    own = dict(zip(weights, dist.own_parts(weights.values())))
    if wrong := not_finite(own, {name for name, _ in module.named_buffers()}):
        raise UserError(
            f"{state.run.folder}: after step {state.step} {len(wrong)} tensors hold numbers that are not finite, such as "
            f"{wrong[0]}, and are not saved; lower `optim.lr` or lengthen `optim.warmup`"
        )


def save_config(state: TrainState) -> TrainConfig:
    """Writes the run as config.json, with the vocabulary, which is known only now, and as about.json where it runs. Returns the
    first."""
    whole = replace(state.run, model=state.model.config)
    with dist.together(state.device):
        if dist.is_main():
            config = with_checksum(cast(dict[str, Json], to_json(whole)))
            write_whole(whole.folder / "config.json", json.dumps(config, indent=2).encode())
            origin = about(state.device) | {"precision": state.precision}
            write_whole(whole.folder / "about.json", json.dumps(origin, indent=2).encode())
    return whole


def save_weights(state: TrainState, name: str, module: Pretraining, **more: Any) -> None:
    """`name`.safetensors: the model of `module` and what is kept of its objectives. Adapters are merged into it, and written
    beside it too."""
    check_in_place(state.lock)
    objectives = module.all_objectives()
    info = {
        "name": state.run.name,
        "task": next(iter(objectives)),
        "step": state.step,
        "elapsed_s": round(state.elapsed, 3),
        "pairs": state.pairs,
        "frozen": frozen_encoders(module.model),
        **describe(state.run.objectives, objectives, inherited_abilities(state)),
    }
    kept = {f"{own}.{key}": value for own, objective in objectives.items() for key, value in objective.kept().items()}
    save_model(state.run.folder, module.model, state.tokenizer, info | more, objectives=kept, name=name)
    save_adapters(state.run.folder / f"{name}-adapters", module.model, state.run.lora, state.run.init)


def inherited_abilities(state: TrainState) -> list[Ability]:
    """Abilities that came with the weights to start from: a joint space still embeds. The others are each objective's own."""
    came = state.inherited is not None and any(name.startswith("embed.") for name in state.inherited.loaded)
    return ["embed"] if came else []


def read_checkpoint(run: TrainConfig, change: Collection[str] = ()) -> dict[str, Any]:
    """The last checkpoint of a run. Raises UserError if another run saved it. `change`: fields that may differ."""
    path = run.folder / CHECKPOINT
    saved = load_checkpoint(path)
    if missing := {"run", "rows", "ranks", "pretraining", "optimiser", "ema", "dropped", *COUNTERS} - set(saved):
        raise UserError(f"{path}: not a checkpoint of a run, it lacks {', '.join(sorted(missing))}")
    with _expect_form(path):
        changed = changed_fields(saved, run)
        allowed = check_names(run, change, saved["run"])
    refuse(path, changed, allowed)
    return saved


def restore(state: TrainState, saved: Mapping[str, Any], change: Collection[str] = ()) -> None:
    """Brings a new state, whose weights are loaded, to where the checkpoint stood. Raises UserError if its data had other
    records, and where it holds something else than was saved. `change`: fields that may differ."""
    path = state.run.folder / CHECKPOINT
    with _expect_form(path):
        changed = changed_data(saved, state.run, state.contents, state.train.count)
        allowed = check_names(state.run, change, saved["run"])
    refuse(path, changed, allowed)
    with _expect_form(path):
        state.changed = changed_fields(saved, state.run) | changed
        if state.division.began != saved["ranks"]:
            state.changed["ranks"] = (saved["ranks"], state.division.began)
        if state.ema is not None and saved["ema"] is None:
            state.ema.module.load_state_dict(state.pretraining.state_dict())
        elif state.ema is not None:
            averaged = saved["ema"]
            if state.sharding is not None:
                averaged = state.sharding.parts_of(averaged, state.ema.state_dict())
            load_exactly(state.ema, averaged, path)
        # Moments are matched by order; older checkpoints do not name their parameters.
        if saved.get("groups", own := group_names(state)) != own:
            raise UserError(
                f"{path}: its optimiser has other groups of parameters; `optim.head_multiplier`, `optim.cross_multiplier`, "
                f"`optim.layer_decay`, `optim.spared`, `optim.parts`, `optim.matrices` and what is trained cannot group them "
                f"otherwise in a continued run: give the values that it was saved with, or start a new run from its weights "
                f"with `init`"
            )
        moments = saved["optimiser"]
        if state.sharding is not None:
            parameters = [p for group in state.optimiser.param_groups for p in group["params"]]
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


def group_names(state: TrainState) -> list[list[str]]:
    """The names of the parameters in each group of the optimiser."""
    names = {id(parameter): name for name, parameter in state.pretraining.named_parameters()}
    return [[names[id(parameter)] for parameter in group["params"]] for group in state.optimiser.param_groups]


def load_optimiser(optimiser: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Takes the moments, and the rate of the last step; everything else is the run's own. Raises ValueError if they are of
    other parameters, or a number is not finite."""
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


@contextmanager
def _expect_form(path: Path) -> Iterator[None]:
    """Turns what reading a checkpoint of another form raises into a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = str(error).partition("\n")[0][:200] or type(error).__name__
        raise UserError(f"{path}: not what a run saves ({reason}); restore the file or start the run anew") from error
