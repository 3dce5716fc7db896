"""`fastvlp.measure_speed` and `vlp bench`: how fast recipes train on this device."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, TypeVar

import torch
from tyro.conf import arg

from fastvlp import dist
from fastvlp.comparison.prepared_arms import computed_in_time, named_arms, with_precision, with_tokenizers
from fastvlp.comparison.settings import with_settings
from fastvlp.errors import UserError
from fastvlp.model.named_sizes import named_size
from fastvlp.provenance import about, data_name
from fastvlp.recipe_options import RECIPES, flat_settings
from fastvlp.speed.clock import Quartiles, in_turn, ratio, seconds
from fastvlp.speed.made_data import with_made_data
from fastvlp.speed.memory import largest_rows, release, room
from fastvlp.speed.peers import PEERS, PeerName
from fastvlp.speed.trial import Arm, Step, Trial
from fastvlp.training.hardware import peak_flops
from fastvlp.training.reduced_start import ReducedStart
from fastvlp.training.train_config import TrainConfig

GIGA = 1e9
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Speed:
    """The measured training speed of one recipe, or of another library with the sizes of a recipe.

    Attributes:
        name: name of the recipe with the varied field, or of the library and the recipe.
        rows: number of pairs in a step.
        step_s: quartiles of the seconds of a step: CPU time of all threads on a CPU, and wall time on a GPU.
        wall_s: median of the wall seconds of a step.
        times: quartiles of the ratio of a step's time to that of the first recipe, in neighbouring steps.
        flops: floating-point operations of a step.
        flops_times: ratio of `flops` to those of the first recipe.
        flops_per_s: floating-point operations per second that were achieved.
        floor_s: seconds that the FLOPs take at the peak of the device; None if that is unknown.
        mfu: share of the device's peak that was achieved; None if the peak is not known.
        pairs_per_s: pairs of a step divided by the median of `step_s`.
        tokens_per_s: predicted tokens of a step divided by the median of `step_s`.
        memory_bytes: largest number of bytes in use at once: weights, optimiser and the tensors of a step. On a CPU it is
            counted, not measured.
        losses: losses of the timed steps, in their order.
        loss_difference: largest relative difference from the losses of the first recipe; None for other libraries, which have
            other weights.
        loader_s: seconds to make the batches of a step; None for other libraries.
        loader_share: `loader_s` as a share of a step's seconds.
        data_wait: share of a step's time that is spent waiting for data, if steps read their batches from the loader.
        compile_s: seconds that PyTorch compiled before the timed steps; None without `compile`.
        largest_batch: largest number of rows of a micro-batch that fits into memory; None if it was not sought.
        config: the varied options, and the options that decide the cost of a step.
    """

    name: str
    rows: int
    step_s: Quartiles
    wall_s: float
    times: Quartiles
    flops: float
    flops_times: float
    flops_per_s: float
    floor_s: float | None
    mfu: float | None
    pairs_per_s: float
    tokens_per_s: float
    memory_bytes: int
    losses: list[float]
    loss_difference: float | None
    loader_s: float | None = None
    loader_share: float | None = None
    data_wait: float | None = None
    compile_s: float | None = None
    largest_batch: int | None = None
    config: Mapping[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class Speeds:
    """The measured training speeds of several recipes, which took turns.

    Attributes:
        arms: the speeds of the recipes, then of other libraries.
        about: device, versions, commit, command and date.
        clock: `cpu` (CPU time) or `wall` (wall time).
        memory_limit: memory in bytes for the largest batch; None if it is the device's memory.
    """

    arms: list[Speed]
    about: Mapping[str, Any]
    clock: str
    memory_limit: float | None = None


def measure_speed(
    recipes: Annotated[Sequence[str | Path | TrainConfig], RECIPES],
    /,
    *,
    model: str | None = None,
    set: Annotated[Sequence[str], arg(constructor=flat_settings)] = (),
    vary: tuple[str, ...] = (),
    made_data: bool = False,
    repetitions: int = 10,
    batches: int = 2,
    beside: tuple[PeerName, ...] = (),
    largest_batch: bool = False,
    memory_gb: float | None = None,
    trace: str | Path | None = None,
    out: str | Path | None = None,
    threads: int | None = None,
) -> Speeds:
    """Measure how fast recipes train on this device: step time, FLOPs, memory and loading, also compared with other libraries.

    The recipes take turns, step by step, so that the ratios of their times are fair on a busy machine. Batches are made first.
    Steps use full inputs, without `reduced`. Times are CPU time on a CPU, and wall time on a GPU. No weights are saved.

    Args:
        recipes: Names of recipes, paths of your own files, or in Python also configs.
        model: Size of the models, such as clip_b16, instead of the sizes in the recipes.
        set: Changes of the recipes' fields: FIELD=VALUE for all recipes, RECIPE:FIELD=VALUE for one.
        vary: FIELD=VALUE,VALUE measures each recipe with each of the values, such as keep=1,0.5; fields vary one at a time.
        made_data: Measure on generated scenes of the embedded corpus and with random weights; needs no data.
        repetitions: Number of timed steps of each recipe.
        batches: Number of different batches that the steps use.
        beside: Other libraries to compare with, transformers or open_clip. Their steps have the sizes of the first recipe.
        largest_batch: Also find the largest micro-batch that fits into memory.
        memory_gb: Memory limit for largest_batch, in 10^9 bytes. Needed on a CPU; by default all memory of a GPU.
        trace: File for a trace of one step of each recipe, for chrome://tracing or Perfetto.
        out: File to which the results are appended, as a line of JSON for each recipe, with commit and device.
        threads: CPU threads that PyTorch uses; by default PyTorch chooses.

    Raises:
        UserError: An option cannot be used, or a recipe cannot be trained.
    """
    if threads:
        torch.set_num_threads(threads)
    runs = varied(named_arms(recipes, set), model, vary)
    device = dist.pick_device(next(iter(runs.values())).device)
    check_options(repetitions, batches, largest_batch, memory_gb, device)
    with TemporaryDirectory() as folder:
        runs = prepared(runs, Path(folder), made_data, batches, repetitions)
        speeds = timed(runs, batches, repetitions, beside, device, Path(trace) if trace is not None else None)
        if largest_batch:
            limit = memory_gb * GIGA if memory_gb is not None else room(device)
            speeds = [with_largest(one, runs.get(one.name), batches, limit, device) for one in speeds]
    result = Speeds(
        arms=speeds,
        about=about(device),
        clock="cpu" if device.type == "cpu" else "wall",
        memory_limit=memory_gb * GIGA if memory_gb is not None else None,
    )
    if out is not None:
        append(Path(out), result)
    return result


def timed(
    runs: Mapping[str, TrainConfig],
    batches: int,
    repetitions: int,
    beside: Sequence[PeerName],
    device: torch.device,
    trace: Path | None,
) -> list[Speed]:
    """Times the steps of the runs, and of other libraries with the sizes of the first run, in turns. Returns their speeds."""
    trials = {name: named(name, partial(Trial, run, batches)) for name, run in runs.items()}
    first = next(iter(trials.values()))
    peers = {f"{peer}, as {first.run.name}": peer for peer in beside}
    arms: dict[str, Arm] = {
        **trials,
        **{name: named(name, partial(PEERS[peer], first)) for name, peer in peers.items()},
    }
    taken = in_turn(list(arms), repetitions, lambda name: named(name, arms[name].step))
    speeds = {name: speed(name, arm, taken, device) for name, arm in arms.items()}
    speeds |= {name: replace(speeds[name], loss_difference=None) for name in arms if name not in trials}
    speeds |= {name: own_speed(speeds[name], trial) for name, trial in trials.items()}
    if trace is not None:
        for name, trial in trials.items():
            trial.trace(trace_file(trace, name, alone=len(trials) == 1))
    return list(speeds.values())


def check_options(
    repetitions: int, batches: int, largest_batch: bool, memory_gb: float | None, device: torch.device
) -> None:
    if dist.launched() > 1:
        raise UserError("steps are measured on one device; start the command without torchrun")
    if repetitions < 1 or batches < 1:
        raise UserError(f"`repetitions` {repetitions} and `batches` {batches} must be at least 1")
    if memory_gb is not None and not (largest_batch and memory_gb > 0):
        raise UserError("`memory_gb` must be above 0, and is only used with `largest_batch`; give both")
    if largest_batch and memory_gb is None and device.type == "cpu":
        raise UserError("`largest_batch` needs a memory limit on a CPU; give `memory_gb`, such as 8")


def varied(runs: Mapping[str, TrainConfig], model: str | None, vary: Sequence[str]) -> dict[str, TrainConfig]:
    """Returns the runs with models of the size `model`, one for each value of each field of `vary`. Their names contain it."""
    sized = {
        name: run if model is None else replace(run, model=named_size(model, like=run.model))
        for name, run in runs.items()
    }
    if not vary:
        return {name: replace(run, name=name) for name, run in sized.items()}
    changes = [change for one in vary for change in single_changes(one)]
    return {
        f"{name} {change}": replace(with_settings(run, [change], name), name=f"{name} {change}")
        for name, run in sized.items()
        for change in changes
    }


def single_changes(vary: str) -> list[str]:
    """FIELD=VALUE for each value of FIELD=VALUE,VALUE. Raises UserError where it is not that."""
    field, equals, values = vary.partition("=")
    if not equals or not values:
        raise UserError(f"`vary` {vary}: write FIELD=VALUE,VALUE, such as keep=1,0.5")
    if field.startswith("reduced"):
        raise UserError(
            f"`vary` {vary}: whole steps are measured, without `reduced`; vary keep, model.image.size or data.max_length"
        )
    return [f"{field}={value}" for value in values.split(",")]


def prepared(
    runs: Mapping[str, TrainConfig], folder: Path, made_data: bool, batches: int, repetitions: int
) -> dict[str, TrainConfig]:
    """Returns the runs with data and tokenizers, ready to be timed: with enough steps, with full inputs, without stored states
    and without trackers."""
    if made_data:
        runs = with_made_data(runs, folder, batches)
    parts = max(len(run.mix or (run,)) for run in runs.values())
    workers = max(run.data.workers for run in runs.values())
    enough = max(200, 4 * (repetitions + 8 * batches * parts + workers))
    plain = {
        name: replace(
            run,
            steps=enough,
            budget_s=None,
            reduced=ReducedStart(),
            out=str(folder / "run"),
            report_to=(),
            patience=None,
            **computed_in_time(run),
        )
        for name, run in runs.items()
    }
    try:
        return with_tokenizers(with_precision(plain), folder)
    except UserError as error:
        if made_data:
            raise
        raise UserError(f"{error}; if you have no data yet, `made_data` measures on generated data") from error


def named(name: str, act: Callable[[], T]) -> T:
    """Returns the result of `act`. A UserError begins with the name of the recipe."""
    try:
        return act()
    except UserError as error:
        raise UserError(str(error) if str(error).startswith(name) else f"{name}: {error}") from error
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"{name}: a step does not fit into the device's memory; set a smaller data.batch_size"
        ) from error


def speed(name: str, arm: Arm, taken: Mapping[str, list[Step]], device: torch.device) -> Speed:
    """Returns the speed of an arm, with its ratios to the first arm. `taken`: the timed steps of all arms."""
    own, base = taken[name], next(iter(taken.values()))
    own_s, base_s = ([seconds(one.lap, device) for one in some] for some in (own, base))
    step_s = Quartiles.of(own_s)
    flops, peak = sum(one.flops for one in own) / len(own), peak_flops(device, arm.precision)
    pairs = [abs(a.loss - b.loss) / max(abs(b.loss), 1e-12) for a, b in zip(own, base)]
    return Speed(
        name=name,
        rows=own[0].rows,
        step_s=step_s,
        wall_s=Quartiles.of([one.lap.wall_s for one in own]).median,
        times=ratio(own_s, base_s),
        flops=flops,
        flops_times=flops / max(1.0, sum(one.flops for one in base) / len(base)),
        flops_per_s=flops / step_s.median,
        floor_s=flops / peak if peak else None,
        mfu=flops / step_s.median / peak if peak else None,
        pairs_per_s=own[0].rows / step_s.median,
        tokens_per_s=sum(one.tokens for one in own) / len(own) / step_s.median,
        memory_bytes=arm.bytes(),
        losses=[one.loss for one in own],
        loss_difference=max(pairs, default=math.nan),
    )


def own_speed(one: Speed, trial: Trial) -> Speed:
    """Adds the values that are measured only for our own recipes, not for other libraries."""
    run = trial.run
    return replace(
        one,
        loader_s=trial.loading.s,
        loader_share=trial.loading.s / one.step_s.median,
        data_wait=trial.data_wait(3),
        compile_s=trial.compile_s,
        config={
            "batch_size": run.data.batch_size,
            "accumulate": run.accumulate,
            "precision": trial.state.precision,
            "compile": run.compile,
            "keep": run.keep,
            "image": run.model.image.size,
            "vocabulary": trial.state.tokenizer.vocab_size,
            "parameters": trial.parameters,
            "objectives": list(run.objectives),
            "data": data_name(str(getattr(run.data, "train", ""))),
        },
    )


def with_largest(one: Speed, run: TrainConfig | None, batches: int, limit: float, device: torch.device) -> Speed:
    """Adds the largest batch of a recipe. For other libraries (`run` None) it is not sought."""
    if run is None:
        return one
    release(device)
    return replace(one, largest_batch=Trial(run, batches).largest_batch(limit, largest_rows))


def trace_file(path: Path, name: str, *, alone: bool) -> Path:
    """Returns the file for a recipe's trace: `path` if there is one recipe, else a path with the recipe's name in it."""
    words = "".join(letter if letter.isalnum() or letter in "._-" else "-" for letter in name)
    return path if alone else path.with_name(f"{path.stem}-{words}{path.suffix}")


def append(path: Path, result: Speeds) -> None:
    """Appends a line of JSON for each arm."""
    path.parent.mkdir(parents=True, exist_ok=True)
    common = {**result.about, "clock": result.clock, "memory_limit": result.memory_limit}
    lines = [json.dumps(common | as_record(one)) + "\n" for one in result.arms]
    # All lines are written in one call, so that lines of other processes cannot come between them.
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(lines))


def as_record(one: Speed) -> dict[str, Any]:
    """Returns a speed as JSON. Quartiles are objects with `low`, `median` and `high`."""
    return {**vars(one), "step_s": one.step_s._asdict(), "times": one.times._asdict()}
