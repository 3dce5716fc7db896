"""Saves a run in its folder: its whole state, the weights, and its config.

A file is written whole or not at all. The state is in one file. In a sharded run, this file names further files with the
tensors.
"""

from __future__ import annotations

import json
import re
from collections import ChainMap
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from fastvlp import dist
from fastvlp.config import Json, to_json
from fastvlp.data.image_cache import free_memory
from fastvlp.errors import UserError, remedy
from fastvlp.files import whole_file, write_whole
from fastvlp.model.frozen_states import frozen_encoders
from fastvlp.model.lora import save_adapters
from fastvlp.model.saving import save_model
from fastvlp.objectives.objective import Ability
from fastvlp.objectives.saved_objectives import describe
from fastvlp.plain_json import with_checksum
from fastvlp.provenance import about
from fastvlp.tensor_files import check_torch_file, not_finite
from fastvlp.training.part_files import (
    KINDS,
    check_parts,
    named_parts,
    next_folder,
    remove_parts,
    with_tensors,
    write_parts,
)
from fastvlp.training.pretraining import Pretraining
from fastvlp.training.run_folder import check_in_place
from fastvlp.training.state import TrainState
from fastvlp.training.train_config import TrainConfig

if TYPE_CHECKING:
    from fastvlp.training.sharding import Sharding

CHECKPOINT = "last.pt"
# Fields of the state that are saved and restored as they are.
COUNTERS = ("step", "elapsed", "pairs", "tokens", "bad_steps", "skipped", "best")
# Fields that older checkpoints lack; they are then 0.
LATER_COUNTERS = ("stale", "validated")
# Share of the free memory that the copy of a state may take. A process that takes more than there is may be killed.
ROOM_FOR_COPY = 0.5
# Key under which the checkpoint of a sharded run names the files of its tensors.
PARTS = "parts"


def save_checkpoint(path: str | Path, state: dict[str, Any]) -> None:
    """Saves tensors, numbers, strings and containers of these. Other types are not allowed, so that reading the file executes
    nothing in it.

    Raises UserError if the disk is full or the folder is not writable; an older file is then unchanged.
    """
    path = Path(path)
    # The name is always the same, so that the next run overwrites the file that a killed run leaves behind.
    with whole_file(path, f"{path.name}.tmp") as part, part.open("wb") as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:
            # After a failed write the zip writer continues, and then raises a RuntimeError about its position.
            cause = error.__context__
            reason = (cause.errno, cause.strerror) if isinstance(cause, OSError) else (None, str(error).splitlines()[0])
            raise OSError(*reason) from error


def load_checkpoint(path: str | Path, kinds: Collection[str] = KINDS) -> dict[str, Any]:
    """Returns the saved state on the CPU, whatever device it was saved from. Raises UserError if a file is missing or damaged.

    kinds: the kinds of tensors to read if tensors are in files of their own. All ranks then call this together.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no checkpoint here; give the folder of a run that has saved one")
    try:
        check_torch_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    # With hostile bytes, torch may raise any exception.
    except Exception as error:
        # Torch's message continues with advice, such as to load the file without the safeguard.
        cause = re.split(r"\.\s|\n", str(error))[0] or type(error).__name__
        raise UserError(
            f"{path}: not a readable checkpoint ({cause}); restore the file or start the run anew"
        ) from error
    if not isinstance(state, dict):
        raise UserError(f"{path}: not a checkpoint of a run, it holds a {type(state).__name__}")
    if PARTS not in state:
        return state
    with expect_form(path):
        folder, checksums = named_parts(state[PARTS])
    check_parts(path.parent / folder, checksums)
    with expect_form(path):
        return with_tensors(path.parent / folder, state, kinds)


def save(state: TrainState, *, wait: bool = True, background: bool = False) -> None:
    """Saves everything that a resumed run needs, and beside it the weights alone. The main rank writes; in a sharded run each
    rank writes its parts. With `wait`, all ranks wait for each other, and if one of them cannot write, all raise the error.

    background: Write a copy while the training continues. `check_saving` and `finish_save` raise its errors.

    Raises UserError if the folder was removed, if the disk is full, or if a weight is not finite; the earlier files are then
    unchanged.
    """
    if state.sharding is not None and not wait:
        # If a rank has ended, its weights are lost.
        return
    finish_save(state, wait=wait)
    with dist.together(state.device) if wait else nullcontext():
        check_finite(state)
    if state.sharding is not None:
        state.saving = begun(sharded_writer(state))
    else:
        source = copied(state) if background and dist.is_main() else state
        state.saving = begun(whole_writer(source))
        if source is state:
            wait_for([state.saving])
    if not background:
        finish_save(state, wait=wait)


def begun(write: Callable[[], int]) -> Future[int]:
    """The result of a function that runs in a thread of its own."""
    pool = ThreadPoolExecutor(1, "checkpoint")
    written = pool.submit(write)
    pool.shutdown(wait=False)
    return written


def check_saving(state: TrainState) -> None:
    """Raises the error of a save in the background, if this rank already knows it."""
    if state.saving is not None and state.saving.done():
        state.saving.result()


def finish_save(state: TrainState, *, wait: bool = True) -> None:
    """Waits until the last save is on the disk, and raises its error; on all ranks if they `wait` for each other."""
    saving = state.saving
    if saving is None:
        return
    wait_for([saving])
    state.saving = None
    with dist.together(state.device) if wait else nullcontext():
        step = saving.result()
    state.saved = step


def copied(state: TrainState) -> TrainState:
    """Returns the present state with copies of its tensors in the CPU's memory; or the state itself, if it cannot be copied or
    there is no memory. The training then waits until everything is written."""
    modules = (state.pretraining, *([] if state.ema is None else [state.ema]))
    tensors = [x for module in modules for x in (*module.parameters(), *module.buffers())]
    tensors += [x for moments in state.optimiser.state.values() for x in moments.values() if isinstance(x, Tensor)]
    # A tensor that is used twice, such as a frozen weight of a momentum copy, is copied once.
    by_id, free = {id(x): x for x in tensors}, free_memory()
    if free is not None and sum(x.nbytes for x in by_id.values()) > ROOM_FOR_COPY * free:
        return state
    try:
        copies = {i: cpu_copy(x) for i, x in by_id.items()}
        pretraining, ema, optimiser = deepcopy((state.pretraining, state.ema, state.optimiser), copies)
    except Exception:
        return state  # such as an encoder of a user's own
    return replace(state, pretraining=pretraining, model=pretraining.model, ema=ema, optimiser=optimiser)


def cpu_copy(x: Tensor) -> Tensor:
    copy = x.detach().to("cpu", copy=True)
    return nn.Parameter(copy, x.requires_grad) if isinstance(x, nn.Parameter) else copy


def whole_writer(state: TrainState) -> Callable[[], int]:
    """Returns a function that writes a run if each rank has all weights; only the main rank writes."""
    if not dist.is_main():
        return partial(int, state.step)
    tensors = {
        "pretraining": state.pretraining.state_dict(),
        "optimiser": state.optimiser.state_dict(),
        "ema": None if state.ema is None else state.ema.state_dict(),
    }
    return partial(write_state, state, described(state) | tensors, state.evaluated)


def sharded_writer(state: TrainState) -> Callable[[], int]:
    """Returns a function that writes a sharded run from copies: the parts of this rank and, on the main rank, the file that
    names them. All ranks call this together, and then call the function."""
    sharding, optimiser, moment = cast("Sharding", state.sharding), state.optimiser.state_dict(), replace(state)
    with dist.together(state.device):
        folder = next_folder(state.run.folder, sharding.part_folder) if dist.is_main() else None
    folder = dist.gather_objects(folder)[0]
    tensors = {f"pretraining.{name}": x for name, x in state.pretraining.state_dict().items()}
    tensors |= {f"optimiser.{i}.{name}": x for i, of in optimiser["state"].items() for name, x in of.items()}
    tensors |= {} if state.ema is None else {f"ema.{name}": x for name, x in state.ema.state_dict().items()}
    parts, evaluated = sharding.own_parts(tensors), sharding.whole(state.evaluated)
    rest = {"pretraining": {}, "optimiser": {"param_groups": optimiser["param_groups"]}, "ema": None}
    saved = described(state) | rest

    def write() -> int:
        with dist.together(torch.device("cpu"), sharding.saving_group):
            own = write_parts(moment.run.folder / folder, parts)
        checksums = dict(ChainMap(*dist.gather_objects(own, sharding.saving_group)))
        if evaluated is not None:
            write_state(moment, {**saved, PARTS: {"folder": folder, "checksums": checksums}}, evaluated)
        return moment.step

    return write


def described(state: TrainState) -> dict[str, Any]:
    """Returns the saved values of a run that are not tensors. They do not change while the training continues."""
    return {name: getattr(state, name) for name in (*COUNTERS, *LATER_COUNTERS)} | {
        "dropped": dict(state.dropped),
        "notes": deepcopy(state.notes),
        "run": to_json(state.run),
        "rows": state.train.count,
        "contents": state.contents,
        # One value for each of the ranks on which the run began.
        "batches": state.train.planned(state.batches),
        "places": state.train.place(state.batches),
        "ranks": state.division.began,
        "groups": group_names(state),
    }


def write_state(state: TrainState, saved: dict[str, Any], evaluated: Pretraining) -> int:
    """Writes the checkpoint `saved`, and the weights of the module `evaluated`. Returns the step."""
    check_in_place(state.lock)
    save_checkpoint(state.run.folder / CHECKPOINT, saved)
    folder = saved[PARTS]["folder"] if PARTS in saved else None
    if state.sharding is not None:
        state.sharding.part_folder = folder
    remove_parts(state.run.folder, keep=folder)
    save_weights(state, "last", evaluated)
    return state.step


def evaluated_whole(state: TrainState) -> Pretraining | None:
    """Returns the module that is validated, with whole weights. If the weights are divided, returns None on all ranks except
    the main one."""
    return state.evaluated if state.sharding is None else state.sharding.whole(state.evaluated)


def check_finite(state: TrainState) -> None:
    """Raises UserError, on every rank, if a weight is NaN or infinite."""
    module = state.pretraining
    weights = module.state_dict()
    own = dict(zip(weights, dist.own_parts(weights.values())))
    if wrong := not_finite(own, {name for name, _ in module.named_buffers()}):
        raise UserError(
            f"{state.run.folder}: after step {state.step} {len(wrong)} tensors hold numbers that are not finite, such as "
            f"{wrong[0]}, and are not saved; lower `optim.lr` or lengthen `optim.warmup`"
        )


def save_config(state: TrainState) -> TrainConfig:
    """Writes config.json, the config of the run with the vocabulary, which is known only now; and about.json, which describes
    the machine. Returns the config."""
    whole = replace(state.run, model=state.model.config)
    with dist.together(state.device):
        if dist.is_main():
            config = with_checksum(cast(dict[str, Json], to_json(whole)))
            write_whole(whole.folder / "config.json", json.dumps(config, indent=2).encode())
            origin = about(state.device) | {"precision": state.precision}
            write_whole(whole.folder / "about.json", json.dumps(origin, indent=2).encode())
    return whole


def save_weights(state: TrainState, name: str, module: Pretraining, **more: Any) -> None:
    """Writes `name`.safetensors: the model of `module`, and the tensors of its objectives that are kept. Adapters are merged
    into the weights, and also written to a file of their own."""
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
    """Returns the abilities that a model keeps from the weights that it started from: a joint space still embeds. All other
    abilities come from the objectives of the run."""
    came = state.inherited is not None and any(name.startswith("embed.") for name in state.inherited.loaded)
    return ["embed"] if came else []


def group_names(state: TrainState) -> list[list[str]]:
    """Returns the names of the parameters in each group of the optimiser."""
    names = {id(parameter): name for name, parameter in state.pretraining.named_parameters()}
    return [[names[id(parameter)] for parameter in group["params"]] for group in state.optimiser.param_groups]


@contextmanager
def expect_form(path: Path) -> Iterator[None]:
    """Turns the exceptions of reading a checkpoint of another form into a UserError. A lack of memory and the end of another
    rank say nothing about the form, and pass."""
    try:
        yield
    except (UserError, MemoryError, torch.OutOfMemoryError):
        raise
    except OSError as error:
        advice = remedy(error, "restore the file or start the run anew")
        raise UserError(f"{path}: cannot read it or its parts ({error.strerror or error}); {advice}") from error
    except Exception as error:
        if dist.explained(error) is not error:
            raise
        reason = str(error).partition("\n")[0][:200] or type(error).__name__
        raise UserError(f"{path}: not what a run saves ({reason}); restore the file or start the run anew") from error
