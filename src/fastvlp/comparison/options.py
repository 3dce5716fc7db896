"""Options of `vlp compare`; nothing here imports torch, so that help answers at once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional, UseAppendAction

from fastvlp.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How the recipes are scored."""

    probe_steps: int = 150
    """Steps of the short fine-tuning, the same for every recipe, before questions and captions are scored."""
    probe_batch: int = 64
    probe_lr: float = 5e-4
    probe_items: int = 2000
    """Questions that are scored."""
    cloze_items: int = 256
    """Pairs whose words are asked for."""
    caption_items: int = 0
    """Pictures that are captioned for CIDEr at every mark; 0 leaves CIDEr out."""
    pictures: int = 6
    """Pictures with captions and answers in the report."""
    split: Literal["val", "test"] = "val"
    """What is scored."""
    vqa: str | None = None
    """Folder of splits with questions; by default the recipe's own data, where it has questions."""

    def __post_init__(self) -> None:
        for name in ("probe_steps", "probe_batch", "probe_items", "cloze_items"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(self, name)}")
        if self.probe_lr <= 0 or self.caption_items < 0 or self.pictures < 0:
            raise UserError("--probe-lr must be above 0, --caption-items and --pictures 0 or more")


@dataclass(frozen=True, kw_only=True)
class Compare:
    """Give several recipes the same training time on this device, score them on the way, and write a report."""

    recipes: Positional[tuple[str, ...]]
    """Names of recipes, or paths of your own files."""
    budget: str = "120s"
    """Training time of each recipe and seed: 90s, 20m, 1.5h."""
    seeds: int = 1
    out: Path = Path("comparison")
    """Folder for results.json and report.html; both are whole after every mark."""
    marks: tuple[float, ...] = (0.25, 0.5, 1.0)
    """Shares of the budget at which the recipes are scored."""
    slice: str = "5s"
    """Length of a turn: the recipes of a seed train by turns."""
    yardsticks: Settings = Settings()
    set: UseAppendAction[tuple[tuple[str, ...], ...]] = ()
    """FIELD=VALUE ..., such as data.train=FOLDER, for all recipes; RECIPE:FIELD=VALUE for one. May be given again."""
    threads: int | None = None
    """Of the CPU."""
