"""The lines of the log before the first step of a run: what it starts from, its sizes and its data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from fastvlp import dist
from fastvlp.data.teacher import TeacherStore
from fastvlp.provenance import device_name
from fastvlp.training.log import RunLog
from fastvlp.training.state import TrainState
from fastvlp.training.trained_parts import part_sizes, sizes_line


def log_start(state: TrainState, log: RunLog, resume: bool) -> None:
    """Logs the device of the run, and what it starts from or is resumed from."""
    run = state.run
    if state.earlier_length not in (None, run.length):
        log.say(f"{run.folder}: length was {state.earlier_length}, now {run.length}")
    if state.changed:
        fields = "; ".join(f"{name} was {old}, now {new}" for name, (old, new) in state.changed.items())
        log.say(f"{run.folder}: continues with changes ({fields})")
    if state.remeasured:
        fields = ", ".join(state.remeasured)
        log.say(
            f"{run.folder}: the lowest validation loss begins anew, because validation measures something else ({fields})"
        )
    if state.division.began != dist.world():
        log.say(f"{run.folder}: {divided(state)}")
    machine: dict[str, Any] = {"device": device_name(state.device), "precision": state.precision}
    log.event("start", step=state.step, elapsed=state.elapsed, **machine)
    if slow := dist.slow_precision(state.precision, state.device):
        log.say(slow)
    if state.step == 0:
        if resume:
            log.say(f"{run.folder}: no checkpoint here to resume from; the run starts from the beginning")
        log_new_run(state, log)
    elif state.progress >= 1:
        longer = "`patience`" if state.out_of_patience else "`steps` or `budget_s`"
        log.say(f"{run.folder}: was at its end already; raise {longer} to train on")


def divided(state: TrainState) -> str:
    """Returns a line on the steps of a run that continues on another number of ranks."""
    division, data = state.division, state.run.data
    size = f"{data.batch_size // division.cut} rows" if data.max_tokens is None else f"up to {data.max_tokens} tokens"
    return (
        f"began on {division.began} ranks and continues on {dist.world()}: steps have the same rows, {division.micro} "
        f"micro-batches of {size} on each rank"
    )


def log_new_run(state: TrainState, log: RunLog) -> None:
    """Logs which weights were inherited, the sizes of the parts, stored states and unreadable records, and warns if a step has
    more rows than there are records."""
    if state.inherited is not None:
        sources = dict.fromkeys(filter(None, (state.run.init, state.run.image, state.run.text)))
        source, added = " and ".join(sources) or None, list(state.tokenizer.added)
        words = f"; tokens added: {', '.join(added)}" if added else ""
        log.event(
            "inherited",
            step=0,
            elapsed=0.0,
            text=f"starts from {source or 'the weights of its encoder'}: {state.inherited.summary()}{words}",
            source=source,
            **asdict(state.inherited),
        )
    sizes = part_sizes(state.model, state.pretraining.objectives)
    parts = {name: size._asdict() for name, size in sizes.items()}
    log.event("parameters", step=0, elapsed=0.0, text=sizes_line(sizes), parts=parts)
    if state.recomputes:
        log_recomputed(state, log)
    for note in state.stored.notes if state.stored is not None else ():
        facts = {**note._asdict(), "path": str(note.path or "")}
        log.event("states", step=0, elapsed=0.0, text=str(note), **facts)
    if state.stored is not None and state.stored.teacher is not None:
        log_teacher(state.stored.teacher, log, counted=state.run.teacher_time == "counted")
    log_dropped(state, state.dropped, log)
    if (cut := state.run.data.cut(state.tokenizer)) is not None and cut.cut:
        text = str(cut).replace("`max_length`", "`data.max_length`")
        log.event("cut", step=0, elapsed=0.0, text=text, **asdict(cut))
    run, records = state.run, state.train.count
    rows = run.data.batch_size * run.accumulate * state.division.began
    log_data(state, log, rows)
    if rows > records and state.pretraining.pair_objectives() and run.data.max_tokens is None:
        log.say(
            f"`data.batch_size` {run.data.batch_size}: a step contrasts {rows} rows of only {records} records, so that it has "
            f"some pairs twice; lower it"
        )
    if run.data.grouping is not None and (pairs := state.pretraining.pair_objectives()):
        log.say(
            f"`data.group` and `data.max_tokens` make batches of rows of one length, and {', '.join(pairs)} tells the rows of "
            f"a batch apart: it mostly sees wrong texts as long as the right one; leave them out"
        )


def log_recomputed(state: TrainState, log: RunLog) -> None:
    """Logs which layers are computed twice, and which encoder cannot do that."""
    some = ", ".join(f"{count} of {name}" for name, count in state.recomputes.items() if count)
    cannot = [name for name, count in state.recomputes.items() if not count]
    none = f"; {' and '.join(cannot)} cannot, and keeps all its states" if cannot else ""
    text = f"computes layers again in the backward pass: {some or 'none'}{none}"
    log.event("recompute", step=0, elapsed=0.0, text=text, layers=state.recomputes)


def log_teacher(teacher: TeacherStore, log: RunLog, *, counted: bool) -> None:
    """Logs what the teacher cost."""
    computing = sum(teacher.computing_s)
    known = teacher.trained_s is not None
    trained = f"was trained for {teacher.trained_s:.0f} s" if known else "was trained for a time that is not known"
    text = f"the teacher {trained}, and its vectors took {computing:.0f} s"
    text += "; both are taken off this run's time" if counted else "; this run's time counts neither"
    log.event("teacher", step=0, elapsed=0.0, text=text, trained_s=teacher.trained_s, computing_s=computing)


def log_data(state: TrainState, log: RunLog, rows: int) -> None:
    """Logs how many records a run reads, in batches of `rows` rows, and in which way."""
    facts: dict[str, Any] = {
        "records": state.train.count,
        "validation": state.val.count if state.val is not None else 0,
        "rows": rows,
        "image": state.model.config.image.size,
        "vocabulary": state.tokenizer.vocab_size,
    }
    # With a token budget the rows of a step vary.
    a_step = f", {rows:,} a step" if state.run.data.max_tokens is None else ""
    text = (
        f"reads {facts['records']:,} records ({facts['validation']:,} for validation){a_step}; images of "
        f"{facts['image']} px; a vocabulary of {facts['vocabulary']:,} tokens"
    )
    log.event("data", step=0, elapsed=0.0, text=text, **facts)


def log_dropped(state: TrainState, dropped: Mapping[str, str], log: RunLog) -> None:
    for key, reason in dropped.items():
        log.event("dropped", step=state.step, elapsed=state.elapsed, record=key, reason=reason)
