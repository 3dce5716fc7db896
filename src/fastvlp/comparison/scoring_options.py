"""Options of the scoring, which all metrics of a comparison share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from fastvlp.config import Count, Positive, Range, check_numbers


@dataclass(frozen=True, kw_only=True)
class ScoringOptions:
    """Options of the scoring. To score questions (VQA) and captions (CIDEr), a copy of each arm is fine-tuned for a few
    steps."""

    probe_steps: Count = 150
    """Number of steps of the short fine-tuning, the same for every arm."""
    probe_batch: Count = 64
    """Number of rows in a batch, in the short fine-tuning and in scoring."""
    probe_lr: Positive = 5e-4
    """Learning rate of the short fine-tuning."""
    probe_items: Count = 2000
    """Number of questions that are scored."""
    cloze_items: Count = 256
    """Number of image-text pairs whose words are predicted for the cloze accuracy."""
    caption_items: Annotated[int, Range(least=0)] = 0
    """Number of pictures that are captioned for CIDEr in each scoring; 0 leaves CIDEr out."""
    pictures: Annotated[int, Range(least=0)] = 6
    """Number of pictures with captions and answers in the report."""
    scores: tuple[str, ...] = ()
    """Scores to measure, such as cloze, next_word, vqa or cider; by default all scores that an arm has."""
    split: Literal["val", "test"] = "val"
    """Split of the data on which the arms are scored."""
    vqa: str | None = None
    """Folder with questions, in a sub-folder for each split; by default the data of the recipe, if it has questions."""

    def measures(self, score: str) -> bool:
        """Whether a score is measured for the arms that have it."""
        return not self.scores or score in self.scores

    def __post_init__(self) -> None:
        check_numbers(self)
