"""The training loop. `steps` trains; `train` adds validation, checkpoints, the log, and stopping after a signal."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections import deque
from collections.abc import Collection, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_

from fastvlp import dist
from fastvlp.batch import Batch, Dropped
from fastvlp.config import show
from fastvlp.data.pairs import Split
from fastvlp.errors import UserError
from fastvlp.objectives.equal_pairs import contents, has_equal
from fastvlp.objectives.objective import Loss, combine, constant
from fastvlp.random import hash64
from fastvlp.training.checkpoint import CHECKPOINT, check_saving, finish_save, save, save_config
from fastvlp.training.first_lines import log_dropped, log_start
from fastvlp.training.flops import Shape
from fastvlp.training.gradient_cache import cache_gradients
from fastvlp.training.last_lines import LAST, log_chance
from fastvlp.training.log import RunLog
from fastvlp.training.optim import rate_factor, set_rate
from fastvlp.training.pretraining import Pretraining, augmented, draw_objective
from fastvlp.training.run_folder import locked
from fastvlp.training.start import start
from fastvlp.training.state import StepReport, TrainState, autocast, due, validates
from fastvlp.training.trackers import check_installed
from fastvlp.training.train_config import TrainConfig
from fastvlp.training.validation import read_before_training, validate, validate_and_keep_best

__all__ = ["StepReport", "TrainConfig", "TrainState", "start", "steps", "train", "validate"]


def steps(state: TrainState) -> Generator[StepReport, None, None]:
    """Trains one step for each report that it yields, until the run is over or a signal stops it."""
    run = state.run
    parameters = [p for group in state.optimiser.param_groups for p in group["params"]]
    batches = state.train.batches(start=state.batches)
    state.pretraining.train()
    while state.progress < 1 and not state.stop:
        began, waited, dropped_before = state.clock(), time.perf_counter(), len(state.dropped)
        with dist.together(state.device):
            check_saving(state)
            micro = [next_batch(state, batches) for _ in range(state.division.micro)]
        data_wait = time.perf_counter() - waited
        micro = [augmented(batch, run.augment) for batch in micro]
        micro = reduced_at_first(state, micro)
        state.pretraining.active = draw_objective(run.mix, run.seed, state.step)
        factor = rate_factor(state.midway, run.optim.warmup, run.optim.decay)
        set_rate(state.optimiser, factor)
        state.flops.begin_step()
        counts, shares = backward(state, micro)

        norm = clip(state, parameters)
        rows = constant(sum(map(len, micro)), norm), equal_rows(state, micro).to(norm)
        totals = dist.all_reduce_sum(torch.stack([*shares.values(), *rows]))
        target_counts = torch.stack([*counts.values()]).float()
        # `tolist` waits for the device. A step waits only here and if it needs a number on the CPU: to select the target
        # tokens, to pack a single stream, while a queue is filling, and for the batch sizes of other ranks.
        grad_norm, *numbers = torch.cat([norm[None], totals, target_counts]).tolist()
        n = len(shares)
        values, pairs, equal, targets = numbers[:n], int(numbers[n]), int(numbers[n + 1]), numbers[n + 2 :]
        skipped = not all(map(math.isfinite, [*values, grad_norm]))
        state.between_steps = False
        if not skipped:
            state.optimiser.step()
            if state.ema is not None:
                state.ema.update_parameters(state.pretraining)
            state.pretraining.after_step()
        state.optimiser.zero_grad()

        state.step += 1
        state.pairs += pairs
        state.tokens += round(sum(targets))
        state.between_steps = True
        seconds = agree(state, dropped_before, state.clock() - began)
        state.elapsed += seconds
        report = StepReport(
            step=state.step,
            losses=dict(zip(shares, values)),
            lr=run.optim.lr * factor,
            pairs=pairs,
            tokens=round(sum(targets)),
            seconds=seconds,
            data_wait=data_wait,
            flops=state.flops.step,
            grad_norm=grad_norm,
            skipped=skipped,
            dropped=dict(list(state.dropped.items())[dropped_before:]),
            equal_pairs=equal if state.pretraining.contrasts else None,
        )
        count_skipped(state, report)
        yield report


def reduced_at_first(state: TrainState, micro: list[Batch]) -> list[Batch]:
    """Returns the micro-batches of a step, with smaller inputs in the first part of the run (`reduced`). Also sets the share of
    each image's patches that is encoded."""
    run, is_reduced = state.run, state.run.reduced.holds(state.midway)
    state.pretraining.keep = run.reduced.keep if is_reduced and run.reduced.keep is not None else run.keep
    return [run.reduced.reduce(batch, state.tokenizer.eos) for batch in micro] if is_reduced else micro


def backward(state: TrainState, micro: list[Batch]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Computes the gradients of a step and adds them to the parameters' `grad`. Returns the number of targets of each loss in
    the whole step, and this rank's share of the minimised `loss` and of the mean of each loss term."""
    pretraining, wrapped = state.pretraining, state.wrapped
    counts = global_counts(pretraining, micro)
    shares = {name: torch.zeros((), device=state.device) for name in ("loss", *counts)}
    seeded = partial(seeded_autocast, state)
    needs_cache = len(micro) > 1 and pretraining.pair_objectives()
    cached = cache_gradients(pretraining, micro, counts, seeded, state.flops) if needs_cache else None
    if cached is not None:
        add_shares(shares, cached.losses, counts)
    for i, batch in enumerate(micro):
        # Ranks average their gradients once a step, with the last micro-batch.
        averaging = nullcontext() if i == len(micro) - 1 else no_sync(wrapped)
        with averaging, state.flops.counting(Shape.of(f"{pretraining.active}/{pretraining.keep}", batch)):
            with seeded(i):
                losses = wrapped(batch, cached.grads[i] if cached is not None else None)
            pretraining.check_names({*losses, *(cached.losses if cached is not None else ())}, counts)
            # `counts` are summed over all ranks, so gradients must be summed too. DDP and FSDP average them; the factor undoes
            # it.
            (combine(losses, counts) * dist.world()).backward()
        add_shares(shares, losses, counts)
    return counts, shares


def clip(state: TrainState, parameters: Sequence[nn.Parameter]) -> Tensor:
    """Scales down the gradients of a step if their norm is above `optim.clip`, and returns the norm before scaling."""
    most = state.run.optim.clip or math.inf
    if state.sharding is None:
        return clip_grad_norm_(parameters, most)
    state.sharding.average_whole(parameters)
    return state.sharding.clip(parameters, most)


def next_batch(state: TrainState, batches: Iterator[tuple[Batch, list[Dropped]]]) -> Batch:
    batch, dropped = next(batches)
    state.dropped |= {record.key: record.reason for record in dropped}
    batch = batch.to(state.device)
    return replace(batch, content=contents(batch)) if state.pretraining.contrasts else batch


def equal_rows(state: TrainState, micro: list[Batch]) -> Tensor:
    """Counts the rows of this rank whose text or image also belongs to another row of the step."""
    if not state.pretraining.contrasts:
        return torch.zeros((), device=state.device)
    own = torch.cat([contents(batch) for batch in micro])
    every, first = dist.gather(own)
    return has_equal(every)[first : first + len(own)].sum()


@contextmanager
def seeded_autocast(state: TrainState, micro: int) -> Iterator[None]:
    """Context in which micro-batch `micro` of the next step runs. Its dropout depends only on the seed, the step, and the
    number of the micro-batch, counted over all ranks: they take micro-batches in turn."""
    torch.manual_seed(hash64(state.run.seed, state.step, micro * dist.world() + dist.rank(), 0))
    with autocast(state):
        yield


def add_shares(shares: dict[str, Tensor], losses: Mapping[str, Loss], counts: Mapping[str, Tensor]) -> None:
    """Adds one micro-batch's part of the loss, and of the mean of each term."""
    shares["loss"] += combine(losses, counts).detach()
    for name in losses.keys() & counts.keys():
        shares[name] += losses[name].total.detach() / counts[name].clamp(min=1)


def no_sync(wrapped: nn.Module) -> AbstractContextManager[None]:
    return wrapped.no_sync() if isinstance(wrapped, DistributedDataParallel) else nullcontext()


def global_counts(pretraining: Pretraining, micro: list[Batch]) -> dict[str, Tensor]:
    """Counts the targets of each loss in the whole step, over all micro-batches and ranks. Losses are divided by these counts:
    in a mean of the micro-batches' means, targets of micro-batches with few targets would have more weight."""
    parts = [pretraining.counts(batch) for batch in micro]
    summed = torch.stack([torch.stack([part[name] for part in parts]).sum() for name in parts[0]])
    return dict(zip(parts[0], dist.all_reduce_sum(summed)))


def agree(state: TrainState, dropped_before: int, seconds: float) -> float:
    """Exchanges the state of all ranks after a step. Returns the mean of their seconds, which the schedule may follow.

    Sets `stop` if any rank has received a signal. It is set only here, so that all ranks leave the loop after the same step.
    Adds the records that other ranks could not read to `dropped`; `dropped_before` is its length before the step.
    """
    state.stop = state.signal
    if dist.world() > 1:
        new = dict(list(state.dropped.items())[dropped_before:])
        sent = [seconds / dist.world(), float(state.signal is not None), float(len(new))]
        seconds, stop, dropped = dist.all_reduce_sum(torch.tensor(sent, device=state.device)).tolist()
        if dropped:
            state.dropped |= {key: reason for part in dist.gather_objects(new) for key, reason in part.items()}
        if stop and state.stop is None:
            state.stop = signal.SIGTERM
    return seconds


def count_skipped(state: TrainState, report: StepReport) -> None:
    """Raises UserError after `max_bad_steps` skipped steps in a row, with the likely cause."""
    state.bad_steps = state.bad_steps + 1 if report.skipped else 0
    state.skipped += report.skipped
    if state.bad_steps < state.run.max_bad_steps:
        return
    bad = [name for name, value in report.losses.items() if not math.isfinite(value)]
    what = f"the loss is not finite ({', '.join(bad)})" if bad else "the loss is finite, but its gradient is not"
    broken = [name for name, p in state.pretraining.named_parameters() if not torch.isfinite(p).all()]
    if broken:
        cause = f"some weights are already not finite ({broken[0]}): start from other weights"
    else:
        cause = f"the learning rate {state.run.optim.lr:g} is too high: lower `optim.lr`, or lengthen `optim.warmup`"
        cause += ", or set `precision` to fp32" if state.precision != "fp32" else ""
    raise UserError(f"step {report.step}: {state.bad_steps} steps in a row were skipped: {what}; likely {cause}")


@contextmanager
def stop_signals(state: TrainState) -> Iterator[None]:
    """Context in which SIGTERM and Ctrl-C end the run after the current step. A second Ctrl-C ends it without that, as soon as
    a checkpoint that is being written is on the disk. A second SIGTERM does not, because a process may get two: one from the
    job queue, and one from `torchrun`."""

    def stop(number: int, frame: object) -> None:
        state.signal = number
        if number == signal.SIGINT:
            signal.signal(number, old[signal.SIGINT])

    # Python allows only the main thread to handle signals.
    main = threading.current_thread() is threading.main_thread()
    numbers = (signal.SIGTERM, signal.SIGINT) if main else ()
    old = {number: signal.getsignal(number) for number in numbers}
    for number in numbers:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, old[number])


def train(
    run: TrainConfig,
    *,
    resume: bool = False,
    change: Collection[str] = (),
    verbose: bool = False,
    scored: Collection[Split] = (),
) -> TrainState:
    """Trains a run to its end.

    Its folder then has config.json (the run), log.jsonl, the weights as best.safetensors and last.safetensors with model.json
    and tokenizer.json, and last.pt, from which the run can be resumed.

    Args:
        run: Config of the run; `fastvlp.recipe` returns one.
        resume: Continue from the run's last checkpoint. If there is none, the run starts from the beginning.
        change: Names of fields, such as `data.batch_size` or `optim.lr`, that a resumed run may change. The run continues after
            the rows that it has already read. Data that were only moved need not be named.
        verbose: Print the whole config first.
        scored: Splits on which the trained model will be scored. Like the validation data, they are read once before the first
            step, so that unreadable records are found early.

    Returns:
        The final state: `model`, `tokenizer`, `step`, `best` (the lowest validation loss) and more.

    Raises:
        UserError: The config, the data or the checkpoint cannot be used, or the loss is not finite.
        SystemExit: A signal stopped the run, and its state was saved. The code is 128 + the number of the signal.
    """
    if not isinstance(run, TrainConfig):
        raise UserError(
            f"`run` must be a TrainConfig, not {run!r}; fastvlp.recipe(NAME) returns the config of a recipe"
        )
    check_installed(run.report_to)
    with dist.process_group(), locked(run.folder) as lock:
        if not resume and (run.folder / CHECKPOINT).exists():
            raise UserError(f"{run.folder}: already has a run; continue it with `resume`, or choose another `out`")
        state = start(run, resume=resume, change=change)
        state.lock = lock
        if state.progress < 1:
            read_before_training(state, scored)
        whole = save_config(state)
        with RunLog(state) as log, stop_signals(state):
            if verbose:
                log.say(show(whole))
            log_start(state, log, resume)
            with saved_on_failure(state):
                train_to_end(state, log)
            if state.stop is not None:
                log.say(f"stopped at step {state.step} and saved; the same command continues it: `vlp ... --resume`")
                raise SystemExit(128 + state.stop)
            best = f", best validation loss {state.best:.4g}" if math.isfinite(state.best) else ""
            early = f", which has not fallen for {state.stale} validations" if state.out_of_patience else ""
            log.say(f"{run.folder}: finished after step {state.step}{best}{early}")
        return state


def train_to_end(state: TrainState, log: RunLog) -> None:
    """Trains, validates and saves until the run is over or a signal stops it. The state is saved before each validation."""
    run = state.run
    if validates(state) and state.progress < 1:
        # The run was resumed from a checkpoint that is saved before a validation. The validation may have been interrupted.
        validate_and_keep_best(state, log)
    last: deque[StepReport] = deque(maxlen=LAST)
    saved = state.elapsed  # the same on all ranks
    for report in steps(state):
        last.append(report)
        log.step(report, state)
        log_dropped(state, report.dropped, log)
        if state.stop is not None or state.progress >= 1:
            continue
        # After a skipped step nothing is saved: the weights may be broken, and the last checkpoint is not.
        is_overdue = run.checkpoint_s is not None and state.elapsed - saved >= run.checkpoint_s
        if (validates(state) or due(run.checkpoint_every, state.step) or is_overdue) and not state.bad_steps:
            # A validation may fail: it begins when all is on the disk.
            save(state, background=not validates(state))
            saved = state.elapsed
        if validates(state):
            finish_save(state)  # of an earlier step, if this one was skipped
            validate_and_keep_best(state, log)
    save(state)
    if state.progress >= 1:
        log_chance(state, last, log)
    if state.stop is None and not state.out_of_patience:
        before = state.best
        validate_and_keep_best(state, log)
        if state.best != before:
            save(state)
    if state.progress >= 1 and state.skipped == state.step > 0:
        raise UserError(
            f"{run.folder}: every step was skipped, because its loss or gradient is not finite; lower `optim.lr`"
        )


@contextmanager
def saved_on_failure(state: TrainState) -> Iterator[None]:
    """Context that saves the state before an error is raised, if the weights are not broken."""
    try:
        try:
            yield
        finally:
            # Nothing is written into the folder any more once it is not locked. Here an older error says more.
            with suppress(Exception):
                finish_save(state, wait=False)
    except Exception as caught:
        error = dist.explained(caught)
        sound = state.between_steps and state.bad_steps < state.run.max_bad_steps
        if sound and state.saved < state.step:
            # Another rank may have ended, so saving must not wait for it. If saving fails, the last checkpoint is still
            # complete.
            with suppress(Exception):
                save(state, wait=False)
        if state.saved == 0 or not dist.is_main() or not (state.run.folder / CHECKPOINT).exists():
            raise error from error.__cause__
        kept = f"the state of step {state.saved} is saved, and the run can be continued with `resume`"
        if isinstance(error, UserError):
            raise UserError(f"{error}; {kept}") from error
        error.add_note(f"{state.run.folder}: {kept}")
        raise
