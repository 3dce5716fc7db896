"""Saves a run in its folder: its whole state in one file, the weights, and its config.

A file is written whole or not at all.
"""

from __future__ import annotations

import json
import re
from contextlib import nullcontext
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
from fastvlp.model.saving import save_model
from fastvlp.objectives.objective import Ability
from fastvlp.objectives.saved_objectives import describe
from fastvlp.plain_json import with_checksum
from fastvlp.provenance import about
from fastvlp.tensor_files import check_torch_file, not_finite
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


def group_names(state: TrainState) -> list[list[str]]:
    """The names of the parameters in each group of the optimiser."""
    names = {id(parameter): name for name, parameter in state.pretraining.named_parameters()}
    return [[names[id(parameter)] for parameter in group["params"]] for group in state.optimiser.param_groups]
