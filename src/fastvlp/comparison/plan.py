"""The plan of a comparison: when the arms train, and when they are scored."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fastvlp.errors import UserError

EIGHTHS = tuple(i / 8 for i in range(1, 9))
# Names of the plan's fields as options, where they differ.
OPTION_NAMES = {"budget_s": "budget", "steps": "budget", "slice_s": "slice"}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The plan of a comparison: when each arm trains, and when it is scored.

    Attributes:
        budget_s: training seconds of each arm and seed, or its steps.
        out: folder of results.json, report.html and the runs.
        seeds: runs of each arm, with consecutive seeds.
        marks: shares of the budget after which the arms are scored; the end is always one of them.
        tuned_marks: those after which a copy is fine-tuned for a score, too; the end is always one of them.
        slice_s: seconds of one turn, or its steps.
        steps: whether the budget and turns are counted in steps, and not in seconds.
    """

    out: Path
    budget_s: float = 120.0
    seeds: int = 1
    marks: tuple[float, ...] = EIGHTHS
    tuned_marks: tuple[float, ...] = (1.0,)
    slice_s: float = 5.0
    steps: bool = False

    def __post_init__(self) -> None:
        if self.budget_s <= 0 or self.slice_s <= 0:
            raise UserError("`budget` and `slice` must be times above 0, such as 120s or 20m")
        if self.steps and self.budget_s % 1:
            raise UserError(f"`budget` must be a whole number of steps, not {self.budget_s:g}")
        if self.seeds < 1:
            raise UserError(f"`seeds` must be at least 1, not {self.seeds}")
        for name, marks in (("marks", self.marks), ("tuned_marks", self.tuned_marks)):
            if not all(0 < mark <= 1 for mark in marks):
                raise UserError(f"`{name}` must be shares of the budget, above 0 and up to 1, not {marks}")

    @property
    def shares(self) -> list[float]:
        """The shares of the budget after which the arms are scored."""
        return sorted({*self.marks, *self.tuned_shares})

    @property
    def tuned_shares(self) -> set[float]:
        """Those after which a copy is fine-tuned for a score, too."""
        return {*self.tuned_marks, 1.0}

    def tunes_at(self, share: float) -> bool:
        """Whether a copy is fine-tuned for the scores after this share."""
        return share in self.tuned_shares
