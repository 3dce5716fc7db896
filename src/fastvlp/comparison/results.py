"""What a comparison measured: one JSON file, and the plain functions that summarise it."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import cattrs

from fastvlp.errors import UserError
from fastvlp.files import write_whole


class Yardstick(NamedTuple):
    title: str
    note: str
    percent: bool


# Every yardstick is better when higher. A score of a name that is not here is shown as the bare number.
YARDSTICKS = {
    "vqa": Yardstick("VQA accuracy", "after the same short fine-tuning", True),
    "cloze": Yardstick(
        "Cloze accuracy", "words from both sides for FLM and MLM, from the left alone for AR and PrefixLM", True
    ),
    "recall": Yardstick("Retrieval", "mean of R@1, 5 and 10 in both directions, by the towers alone", True),
    "image_to_text/r1": Yardstick("Text R@1", "one of an image's own captions comes first", True),
    "text_to_image/r1": Yardstick("Image R@1", "a caption's own image comes first", True),
    "cider": Yardstick("CIDEr", "greedy captions after the same short fine-tuning", False),
}


@dataclass(frozen=True, kw_only=True)
class Spent:
    """Training so far. `time`: wall seconds inside the steps, data wait included; `cpu`: CPU seconds of this process in
    them; `wait`: the part of `time` spent waiting for data; `tokens`: predicted tokens."""

    time: float = 0.0
    cpu: float = 0.0
    wait: float = 0.0
    steps: int = 0
    pairs: int = 0
    tokens: int = 0


@dataclass(frozen=True, kw_only=True)
class Mark:
    share: float
    spent: Spent
    scores: dict[str, float]
    scoring_s: float = 0.0


@dataclass(frozen=True, kw_only=True)
class LossPoint:
    spent: Spent
    losses: dict[str, float]


@dataclass(kw_only=True)
class ArmRun:
    """One arm with one seed. `failure`: why it stopped before its budget was spent."""

    arm: str
    seed: int
    marks: list[Mark] = field(default_factory=list)
    curve: list[LossPoint] = field(default_factory=list)
    dropped: int = 0
    failure: str | None = None


@dataclass(frozen=True, kw_only=True)
class Answered:
    question: str
    right: str
    answers: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A validation picture (data URL) with what each arm says of it."""

    key: str
    picture: str
    references: list[str]
    captions: dict[str, str]
    questions: list[Answered]


@dataclass(kw_only=True)
class Comparison:
    """The content of results.json. `reference`: the arm that the others are timed against. `about`: device, versions,
    commit, command, date. `settings`: the comparison's own options. `configs`: each arm's resolved run."""

    arms: list[str]
    reference: str
    budget_s: float
    seeds: int
    shares: list[float]
    about: dict[str, Any]
    settings: dict[str, Any]
    configs: dict[str, dict[str, Any]]
    runs: list[ArmRun] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)

    def of(self, arm: str) -> list[ArmRun]:
        return [run for run in self.runs if run.arm == arm]

    @property
    def yardsticks(self) -> list[str]:
        """Names of what was scored, the known ones first."""
        seen = {name for run in self.runs for mark in run.marks for name in mark.scores}
        return [name for name in YARDSTICKS if name in seen] + sorted(seen - set(YARDSTICKS))

    def save(self, path: Path) -> None:
        write_whole(path, json.dumps(asdict(self), ensure_ascii=False, indent=1).encode())

    @staticmethod
    def load(path: Path) -> Comparison:
        """Raises UserError for a file that is not a comparison's results."""
        try:
            return cattrs.structure(json.loads(path.read_bytes()), Comparison)
        except OSError as error:
            raise UserError(
                f"{path}: cannot read ({error.strerror}); give the results.json of `vlp compare`"
            ) from error
        except (ValueError, KeyError, TypeError, cattrs.BaseValidationError) as error:
            raise UserError(f"{path}: not the results of `vlp compare`; give its results.json") from error


class Spread(NamedTuple):
    """Mean and sample standard deviation over n seeds (deviation 0 for one)."""

    mean: float
    deviation: float
    n: int


def spread(values: Sequence[float]) -> Spread | None:
    if not values:
        return None
    return Spread(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0, len(values))


class Reached(NamedTuple):
    """Training seconds at which a score was reached; `by`: already at the first mark, so it may have been earlier."""

    time: float
    by: bool


def first_reached(times: Sequence[float], scores: Sequence[float], target: float) -> Reached | None:
    """The first time the curve, straight between its marks, is at or above `target`; None if never."""
    for i, (time, score) in enumerate(zip(times, scores)):
        if score >= target:
            if i == 0:
                return Reached(time, True)
            share = (target - scores[i - 1]) / (score - scores[i - 1])
            return Reached(times[i - 1] + share * (time - times[i - 1]), False)
    return None


def reached(run: ArmRun, yardstick: str, target: float) -> Reached | None:
    scored = [mark for mark in run.marks if yardstick in mark.scores]
    return first_reached([m.spent.time for m in scored], [m.scores[yardstick] for m in scored], target)


class Speedup(NamedTuple):
    """Time-to-quality over the seeds that reached it: the reference's time divided by the arm's. `at_least`: some seed
    was there at its first mark. `reached` of `n` seeds got there at all."""

    ratio: Spread | None
    at_least: bool
    reached: int
    n: int

    def __str__(self) -> str:
        if self.ratio is None:
            return "not reached" if self.n else "-"
        bound = "≥ " if self.at_least else ""
        some = f" ({self.reached} of {self.n} seeds)" if self.reached < self.n else ""
        return f"{bound}{self.ratio.mean:.2f}{f' ± {self.ratio.deviation:.2f}' if self.ratio.n > 1 else ''}×{some}"


def speedup(comparison: Comparison, arm: str, yardstick: str) -> Speedup:
    """How much sooner `arm` reaches the reference's final score. Both sides count the first time their curve is there,
    seed by seed, so the reference itself has 1. A seed whose reference has its final score at the first mark already cannot
    be timed, and is left out."""
    references = {run.seed: run for run in comparison.of(comparison.reference)}
    ratios, at_least, n = [], False, 0
    for run in comparison.of(arm):
        reference = references.get(run.seed)
        finals = [mark.scores[yardstick] for mark in reference.marks if yardstick in mark.scores] if reference else []
        if reference is None or not finals or not any(yardstick in mark.scores for mark in run.marks):
            continue
        own, theirs = reached(run, yardstick, finals[-1]), reached(reference, yardstick, finals[-1])
        if theirs is None or theirs.by:
            continue
        n += 1
        if own:
            ratios.append(theirs.time / own.time)
            at_least |= own.by
    return Speedup(spread(ratios), at_least, len(ratios), n)


def time_to_quality(comparison: Comparison, arm: str, yardstick: str) -> str:
    """A cell of the table: the arm's speed-up, 1 for the reference itself."""
    return "1" if arm == comparison.reference else str(speedup(comparison, arm, yardstick))


@dataclass(frozen=True, kw_only=True)
class Summary:
    """One row of the table: means over seeds at the last mark; `scores` by yardstick and mark (None: not scored)."""

    arm: str
    steps: float
    pairs: float
    pairs_per_s: float
    tokens_per_s: float
    wait: float
    cpu: float
    scores: dict[str, list[Spread | None]]
    speedups: dict[str, Speedup]
    failures: list[str]

    def final(self, yardstick: str) -> Spread | None:
        return next((s for s in reversed(self.scores[yardstick]) if s), None)


def summarise(comparison: Comparison) -> list[Summary]:
    rows = []
    for arm in comparison.arms:
        runs = comparison.of(arm)
        last = [run.marks[-1].spent for run in runs if run.marks] or [Spent()]
        time = max(sum(s.time for s in last), 1e-9)
        scores = {
            name: [
                spread([m.scores[name] for run in runs for m in run.marks if m.share == share and name in m.scores])
                for share in comparison.shares
            ]
            for name in comparison.yardsticks
        }
        rows.append(
            Summary(
                arm=arm,
                steps=statistics.fmean(s.steps for s in last),
                pairs=statistics.fmean(s.pairs for s in last),
                pairs_per_s=sum(s.pairs for s in last) / time,
                tokens_per_s=sum(s.tokens for s in last) / time,
                wait=sum(s.wait for s in last) / time,
                cpu=sum(s.cpu for s in last) / time,
                scores=scores,
                speedups={name: speedup(comparison, arm, name) for name in comparison.yardsticks},
                failures=[f"seed {run.seed}: {run.failure}" for run in runs if run.failure],
            )
        )
    return rows


def shown(yardstick: str, value: Spread | None) -> str:
    """A score for reading: per cent where the yardstick is a share, with its spread where there are several seeds."""
    if value is None:
        return "-"
    percent = yardstick in YARDSTICKS and YARDSTICKS[yardstick].percent
    scale, digits = (100, 1) if percent else (1, 3)
    wide = f" ± {value.deviation * scale:.{digits}f}" if value.n > 1 else ""
    return f"{value.mean * scale:.{digits}f}{wide}{' %' if percent else ''}"


def title(yardstick: str) -> Yardstick:
    return YARDSTICKS.get(yardstick, Yardstick(yardstick, "", False))


def seconds(value: float) -> str:
    """45 s, 2 min, 1.5 h."""
    for size, unit in ((3600, "h"), (60, "min")):
        if value >= 2 * size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.3g} s"
