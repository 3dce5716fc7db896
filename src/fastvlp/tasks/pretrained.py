"""The pretrained run that fine-tuning starts from: its model, and how it prepared images and texts."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from fastvlp.data.records.transform import Fit
from fastvlp.data.regions import RegionSource
from fastvlp.model.model import Bos, ModelConfig, Reading
from fastvlp.model.saved_run import read_saved_run
from fastvlp.model.saving import Saved, load_model
from fastvlp.objectives.saved_objectives import saved_bos


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """The preprocessing of images and texts in a run.

    Attributes:
        regions: where regions of images came from; the records' objects where the run had none. Its classes are left out.
        fit: how an image became a square.
        max_length: tokens of a text, `<s>` and `</s>` included, after which it was cut.
        captions: field of the records with the captions.
    """

    regions: RegionSource = field(default_factory=RegionSource)
    fit: Fit = "crop"
    max_length: int = 50
    captions: str = "captions"


class Pretrained(NamedTuple):
    """A pretrained run.

    Attributes:
        folder: its folder.
        saved: its best weights and what was saved with them.
        preprocessing: how it prepared images and texts.
        config: the model that is fine-tuned: its own, or one that has further parts or larger images.
        reading: how that model reads texts: as in pretraining.
    """

    folder: str
    saved: Saved
    preprocessing: Preprocessing
    config: ModelConfig
    reading: Reading

    @property
    def bos(self) -> Bos:
        """The tokens that the model's `<s>` attended to in training."""
        return saved_bos(self.saved)


def load_pretrained(folder: str) -> Pretrained:
    """Raises UserError if the folder is no run, or its config is damaged."""
    saved = load_model(folder)
    return Pretrained(folder, saved, preprocessing_of(folder), saved.model.config, saved.info.get("reading", "full"))


def preprocessing_of(folder: str | Path) -> Preprocessing:
    """Raises UserError if the run's config is damaged."""
    data = read_saved_run(folder).data
    regions = replace(data.regions or RegionSource(), classes=None)
    # A crop would leave out some of what a detector found.
    fit: Fit = "squash" if "fit" not in data.stated and regions.stored else data.fit
    return Preprocessing(regions=regions, fit=fit, max_length=data.max_length, captions=data.captions)
