"""The results of a comparison: what is kept in results.json."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import cattrs

from fastvlp.errors import UserError
from fastvlp.files import read_plain, write_whole
from fastvlp.plain_json import parse_json


@dataclass(frozen=True)
class Scored:
    """Values of an arm by score, their standard errors, what chance and the texts alone would score, and how many
    images were scored, where these are known."""

    values: dict[str, float] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    chance: dict[str, float] = field(default_factory=dict)
    blind: dict[str, float] = field(default_factory=dict)
    images: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class TrainingCost:
    """The cost of an arm's training so far.

    Attributes:
        time: seconds inside the training steps by the comparison's clock: CPU time of the process, or wall time on a GPU.
        wall: wall seconds inside the training steps, waiting for data included.
        cpu: CPU seconds of this process inside the training steps.
        wait: the part of `wall` that was spent waiting for data.
        steps: optimiser steps.
        pairs: image-text pairs.
        tokens: predicted tokens.
    """

    time: float = 0.0
    wall: float = 0.0
    cpu: float = 0.0
    wait: float = 0.0
    steps: int = 0
    pairs: int = 0
    tokens: int = 0


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """The scores of an arm after a share of its training time, with their standard errors where these are known; `scoring_s`:
    seconds that scoring took."""

    share: float
    spent: TrainingCost
    scores: dict[str, float]
    errors: dict[str, float] = field(default_factory=dict)
    scoring_s: float = 0.0


@dataclass(frozen=True, kw_only=True)
class LossPoint:
    """A point of the loss curves: the mean of each loss over the steps since the point before."""

    spent: TrainingCost
    losses: dict[str, float]


@dataclass(kw_only=True)
class ArmRun:
    """One arm with one seed.

    Attributes:
        marks: the measurements, in order.
        curve: the training losses.
        dropped: unreadable records that training left out.
        failure: why the arm stopped before the end of its time; None if it did not.
        contents: hashes of the records of the splits; None if that is not known.
    """

    arm: str
    seed: int
    marks: list[Measurement] = field(default_factory=list)
    curve: list[LossPoint] = field(default_factory=list)
    dropped: int = 0
    failure: str | None = None
    contents: dict[str, str | None] = field(default_factory=dict)

    def is_done(self, shares: Sequence[float]) -> bool:
        """Whether it has all its scores, or has failed."""
        return len(self.marks) == len(shares) or self.failure is not None


@dataclass(frozen=True, kw_only=True)
class AnsweredQuestion:
    """A question with its right answer and the answer of each arm."""

    question: str
    right: str
    answers: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A picture of the scored split, as a data URL, with the captions and answers of each arm."""

    key: str
    picture: str
    references: list[str]
    captions: dict[str, str]
    questions: list[AnsweredQuestion]


@dataclass(kw_only=True)
class Comparison:
    """The content of results.json.

    Attributes:
        reference: the arm that the others are timed against.
        budget_s: training seconds of each arm and seed, or its steps.
        shares: shares of the budget after which the arms are scored.
        about: device, versions, commit, command and date.
        settings: options of the comparison.
        configs: the whole config of each arm.
        samples: pictures for the report.
        chance: what chance would score, by score.
        blind: what the texts alone would score, without images, by score.
        images: how many images were scored, by score.
        finished: whether all arms were trained and scored.
        sampled: the arms whose captions and answers were asked for.
        added: arms that were added after the others were finished, with device, versions, commit, command and date of that.
        continued: where and when it was continued with other code than before: as `about`.
        clock: by which training time was measured: CPU time of the process, or wall time.
        counted: what `budget_s` is a number of.
        folder: where results.json and report.html are; not saved.
    """

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
    chance: dict[str, float] = field(default_factory=dict)
    blind: dict[str, float] = field(default_factory=dict)
    images: dict[str, int] = field(default_factory=dict)
    finished: bool = True
    sampled: list[str] = field(default_factory=list)
    added: dict[str, dict[str, Any]] = field(default_factory=dict)
    continued: list[dict[str, Any]] = field(default_factory=list)
    clock: Literal["cpu", "wall"] = "wall"
    counted: Literal["seconds", "steps"] = "seconds"
    folder: Path | None = field(default=None, compare=False)

    def run_of(self, arm: str, seed: int) -> ArmRun | None:
        """The run of one arm with one seed, if it was begun."""
        return next((run for run in self.runs_of(arm) if run.seed == seed), None)

    def runs_of(self, arm: str) -> list[ArmRun]:
        """The runs of one arm, one for each seed."""
        return [run for run in self.runs if run.arm == arm]

    def save(self, path: Path) -> None:
        """Writes all but `folder` as JSON. Raises UserError if the file cannot be written."""
        content = {name: value for name, value in asdict(self).items() if name != "folder"}
        write_whole(path, json.dumps(content, ensure_ascii=False, indent=1).encode())

    @staticmethod
    def load(path: Path) -> Comparison:
        """Reads a results.json. Raises UserError for a file that is none."""
        try:
            comparison = cattrs.structure(parse_json(read_plain(path)), Comparison)
        except OSError as error:
            raise UserError(f"{path}: cannot read ({error.strerror}); give the results.json of a comparison") from error
        except (ValueError, KeyError, TypeError, cattrs.BaseValidationError) as error:
            raise UserError(f"{path}: not the results of a comparison; give its results.json") from error
        comparison.folder = path.parent
        return comparison
