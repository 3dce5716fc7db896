"""The options of scoring, which all metrics of a comparison share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fastvlp.errors import UserError


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
