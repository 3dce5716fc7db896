"""The interface of a metric by which the arms of a comparison are scored, and the options that all metrics share.

A metric of your own is a subclass in a file that is imported: it is then measured and reported like those of the package.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple

from fastvlp.errors import UserError
from fastvlp.extensions import variants

if TYPE_CHECKING:
    from fastvlp.comparison.short_finetuning import ShortFinetuning
    from fastvlp.training.state import TrainState


@dataclass(frozen=True, kw_only=True)
class ScoringOptions:
    """How the arms are scored. Before questions and captions, a copy of each arm is fine-tuned for a few steps."""

    probe_steps: int = 150
    """Steps of the short fine-tuning, the same for every arm."""
    probe_batch: int = 64
    """Rows of a batch, in the short fine-tuning and in scoring."""
    probe_lr: float = 5e-4
    """Learning rate of the short fine-tuning."""
    probe_items: int = 2000
    """Questions that are scored."""
    cloze_items: int = 256
    """Image-text pairs whose words are predicted for the cloze accuracy."""
    caption_items: int = 0
    """Pictures that are captioned for CIDEr in each scoring; 0 leaves CIDEr out."""
    pictures: int = 6
    """Pictures with captions and answers in the report."""
    split: Literal["val", "test"] = "val"
    """Split of the data on which the arms are scored."""
    vqa: str | None = None
    """Folder with a folder of questions for each split; by default the data of the recipe, if it has questions."""

    def __post_init__(self) -> None:
        for name in ("probe_steps", "probe_batch", "probe_items", "cloze_items"):
            if getattr(self, name) < 1:
                raise UserError(f"`{name}` must be at least 1, not {getattr(self, name)}")
        if self.probe_lr <= 0:
            raise UserError(f"`probe_lr` must be above 0, not {self.probe_lr}")
        for name in ("caption_items", "pictures"):
            if getattr(self, name) < 0:
                raise UserError(f"`{name}` must be 0 or more, not {getattr(self, name)}")


class Score(NamedTuple):
    """A number that a metric gives each arm; higher is better.

    Attributes:
        name: its key in results.json.
        title: its heading in the report.
        note: how it was measured, as the end of a sentence about the title.
        percent: whether it is a share in 0..1, to be shown in per cent.
    """

    name: str
    title: str
    note: str = ""
    percent: bool = False


class Metric(abc.ABC):
    """A measurement of an arm. It must not change the arm's state.

    Attributes:
        scores: the numbers that it gives.
        order: the place of its scores in the report, which begins with the lowest; the first one is the headline.
    """

    scores: ClassVar[tuple[Score, ...]]
    order: ClassVar[int] = 100

    def __init__(self, finetuning: ShortFinetuning) -> None:
        self.finetuning = finetuning
        self.options = finetuning.options

    @abc.abstractmethod
    def fits(self, state: TrainState) -> bool:
        """Whether an arm can be measured, by its model, its objectives and its data."""

    @abc.abstractmethod
    def measure(self, state: TrainState) -> dict[str, float]:
        """The value of each of `scores`, by name."""


def metric_types() -> list[type[Metric]]:
    """All metrics, in the order of the report."""
    found = variants(Metric, "fastvlp.comparison.metrics")
    return sorted(found, key=lambda metric: metric.order)


def known_scores() -> dict[str, Score]:
    """The scores of all metrics by name, in the order of the report."""
    return {score.name: score for metric in metric_types() for score in metric.scores}
