"""The log of a run: a file with one JSON object on each line, optional trackers, and a live view on a terminal."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn
from rich.text import Text

from fastvlp import dist
from fastvlp.config import flatten
from fastvlp.errors import UserError, remedy
from fastvlp.files import write_whole
from fastvlp.model.saved_run import whole_config
from fastvlp.plain_json import parse_json
from fastvlp.training.blocks import compiled
from fastvlp.training.hardware import peak_flops, peak_memory
from fastvlp.training.run_folder import check_in_place
from fastvlp.training.state import StepReport, TrainState, validates
from fastvlp.training.trackers import Tracker, open_tracker

# Longest time between two lines, in seconds.
SILENCE_S = 10.0


@dataclass(kw_only=True)
class _Totals:
    """Sums over the steps since the last line. `flops` are those of this rank; pairs and tokens are those of all ranks.
    `equal_pairs`: number of pairs whose text or image also belongs to another pair of the step; None if no objective contrasts
    pairs."""

    steps: int = 0
    pairs: int = 0
    equal_pairs: int | None = None
    tokens: int = 0
    seconds: float = 0.0
    data_wait: float = 0.0
    flops: float = 0.0

    def add(self, report: StepReport) -> None:
        self.steps += 1
        for name in ("pairs", "tokens", "seconds", "data_wait", "flops"):
            setattr(self, name, getattr(self, name) + getattr(report, name))
        if report.equal_pairs is not None:
            self.equal_pairs = (self.equal_pairs or 0) + report.equal_pairs

    def rates(self, peak: float | None) -> dict[str, float]:
        seconds = max(self.seconds, 1e-9)
        rates = {
            "pairs_per_s": self.pairs / seconds,
            "tokens_per_s": self.tokens / seconds,
            "data_wait": self.data_wait / seconds,
            "flops_per_s": self.flops / seconds,
        }
        if self.equal_pairs is not None:
            rates["equal_pairs"] = self.equal_pairs / max(1, self.pairs)
        return rates | ({"mfu": rates["flops_per_s"] / peak} if peak else {})


class RunLog:
    """Writes log.jsonl and prints. Only the first rank writes; on the others every method does nothing.

    It is made when a run starts or resumes at `state.step`. Lines of later steps are removed from the file, because these steps
    will be run again. With `quiet` nothing is printed. A context manager: the live view ends with the block.
    """

    def __init__(self, state: TrainState, *, quiet: bool = False, console: Console | None = None):
        run = state.run
        self.active = dist.is_main()
        self.path, self.device, self._lock = run.folder / "log.jsonl", state.device, state.lock
        self.peak = peak_flops(state.device, state.precision)
        self.quiet, self.console = quiet, console or Console()
        self._totals, self._seconds_a_step = _Totals(), 0.0
        self._compiled = compiled() if run.compile else None
        self._live: Live | None = None
        self._trackers: dict[str, Tracker] = {}
        if not self.active:
            return
        rewind(self.path, state.step, revalidates=validates(state))
        shown = flatten(whole_config(run.folder)) if run.report_to else {}
        self._trackers = {
            name: open_tracker(name, run.folder, run=run.name, step=state.step, config=shown) for name in run.report_to
        }
        if not quiet and self.console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(None), TextColumn("{task.percentage:>3.0f} %"))
            self._progress = Progress(*columns, console=self.console, expand=True)
            self._task = self._progress.add_task(run.name, total=1.0)
            self._progress.update(self._task, completed=state.progress)
            self._live = Live(self._progress, console=self.console, refresh_per_second=4)
            self._live.start()

    def step(self, report: StepReport, state: TrainState) -> None:
        """Adds a step. A line is written every `log_every` steps, earlier if these take long, after a skipped step, and after
        the last step."""
        self._totals.add(report)
        due = report.step % state.run.log_every == 0 or self._totals.seconds > SILENCE_S or state.progress >= 1
        if self.active and (due or report.skipped):
            self._train(report, state)

    def _train(self, report: StepReport, state: TrainState) -> None:
        totals, self._totals = self._totals, _Totals()
        seconds = totals.seconds / totals.steps
        self._seconds_a_step = 0.7 * self._seconds_a_step + 0.3 * seconds if self._seconds_a_step else seconds
        fields: dict[str, Any] = {"elapsed": state.elapsed, "lr": report.lr, "grad_norm": report.grad_norm}
        fields |= _flat(report.losses) | totals.rates(self.peak)
        fields |= {"memory": peak_memory(self.device), "skipped": state.skipped, "dropped": len(state.dropped)}
        if state.run.steps is not None:
            fields["left"] = (state.run.steps - report.step) * self._seconds_a_step
        else:
            fields["left"] = max(0.0, (state.run.budget_s or 0.0) - state.elapsed)
        self._record("train", report.step, fields)
        self._log_compiled(report, state)
        line = train_line(report.step, state.run.steps, fields)
        if self._live is not None:
            self._progress.update(self._task, completed=state.progress)
            self._live.update(Group(self._progress, Text(line)))
        else:
            self.say(line)

    def _log_compiled(self, report: StepReport, state: TrainState) -> None:
        """Writes a line about graphs that were compiled since the last line; after the first steps there should be none."""
        if self._compiled is None or (now := compiled()) == self._compiled:
            return
        graphs, seconds = (new - old for new, old in zip(now, self._compiled))
        self._compiled = now
        facts: dict[str, Any] = {"graphs": graphs, "seconds": seconds}
        text = f"compiled {graphs} kinds of layers in {seconds:.0f} s"
        self.event("compiled", step=report.step, elapsed=state.elapsed, text=text, **facts)

    def event(
        self,
        kind: str,
        *,
        step: int,
        elapsed: float,
        losses: Mapping[str, float] | None = None,
        text: str | None = None,
        **fields: Any,
    ) -> None:
        """Writes a line about anything except training steps: validation, inherited weights, a dropped record. The file
        contains lists in full; only their lengths are printed. `text` is printed instead of the fields."""
        if self.active:
            record = _flat(losses or {}) | fields
            self._record(kind, step, {"elapsed": elapsed} | record)
            shown = text or "  ".join([kind, *(f"{name} {_short(value)}" for name, value in record.items())])
            self.say(f"step {step}  {shown}")

    def say(self, text: str) -> None:
        if self.active and not self.quiet:
            self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None
        for name in [*self._trackers]:
            self._track(name, lambda tracker: tracker.close())

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _record(self, kind: str, step: int, fields: Mapping[str, Any]) -> None:
        # JSON has no NaN: null stands for a number that is not finite.
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in fields.items()}
        line = json.dumps({"kind": kind, "step": step, "time": round(time.time(), 3)} | clean)
        check_in_place(self._lock)
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:
            advice = remedy(error, "free space and resume the run")
            raise UserError(f"{self.path}: cannot write ({error.strerror}); {advice}") from error
        numbers = {f"{kind}/{k}": v for k, v in clean.items() if isinstance(v, int | float) and not isinstance(v, bool)}
        for name in [*self._trackers] if numbers else ():
            self._track(name, lambda tracker: tracker.log(numbers, step))

    def _track(self, name: str, act: Callable[[Tracker], None]) -> None:
        """Does something with a tracker. One that fails is dropped: the run is worth more, and has its own log."""
        try:
            act(self._trackers[name])
        except Exception as error:  # each tracker has errors of its own
            del self._trackers[name]
            reason = str(error).partition("\n")[0][:200] or type(error).__name__
            self.say(f"{name}: shows no more numbers ({reason}); the log goes on in log.jsonl")


def _flat(losses: Mapping[str, float]) -> dict[str, float]:
    return {name if name == "loss" else f"loss/{name}": value for name, value in losses.items()}


def rewind(path: Path, step: int, *, revalidates: bool = False) -> None:
    """Removes the lines after `step`, because a resumed run writes them again. Also removes a line that a kill has cut off and,
    with `revalidates`, the line of the validation at `step`."""
    if not path.exists():
        write_whole(path, b"")
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = parse_json(line)
            again = revalidates and record["step"] == step and record["kind"] == "validation"
            if record["step"] <= step and not again:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue
    write_whole(path, "".join(kept).encode())


def train_line(step: int, steps: int | None, fields: Mapping[str, Any]) -> str:
    """Returns the fields of a training record as one line for readers."""
    losses = {k.removeprefix("loss/"): _short(v) for k, v in fields.items() if k.startswith("loss/")}
    # If there is only one term, its value is the total. Its name shows which objective of a mix the step ran.
    terms = [f"{k} {v}" for k, v in losses.items()] if len(losses) > 1 or "loss" not in fields else [*losses]
    total = f"loss {_short(fields['loss'])}" if "loss" in fields else ""
    parts = [
        f"step {step}/{steps}" if steps else f"step {step}",
        f"{total} ({', '.join(terms)})" if total and terms else total or ", ".join(terms),
        f"lr {fields['lr']:.1e}",
        f"{_scaled(fields['pairs_per_s'])}pairs/s",
        f"{_scaled(fields['tokens_per_s'])}tokens/s",
        f"data wait {fields['data_wait']:.0%}",
        f"MFU {fields['mfu']:.0%}" if "mfu" in fields else f"{_scaled(fields['flops_per_s'])}FLOP/s",
        f"{fields['memory'] / 1e9:.2f} GB",
        *([f"equal pairs {fields['equal_pairs']:.1%}"] if fields.get("equal_pairs") else []),
        *(f"{name} {fields[name]}" for name in ("skipped", "dropped") if fields[name]),
        f"left {_clock(fields['left'])}",
    ]
    return "  ".join(parts)


def _short(value: Any) -> str:
    if isinstance(value, list):
        return str(len(value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _scaled(value: float) -> str:
    """Returns a number with the prefix of its unit: `1.5 k`, `12 `."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.3g} "


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s"
