"""Masked diffusion captioning (arXiv 2510.26799) on your own image-text pairs: flm_photos with another objective.

    vlp data import PAIRS --out photos --val 0.1 --max-side 192
    vlp pretrain mdc_photos

Two minutes of one CPU core and a smaller model, three seeds: 20.9 % of the cloze words (FLM 25.6, MLM 24.0;
docs/log.md, entry 55).
"""

from dataclasses import replace

from fastvlp.objectives.mdc import MDCConfig
from fastvlp.recipes.flm_photos import flm_photos
from fastvlp.training.train_config import TrainConfig


def mdc_photos() -> TrainConfig:
    run = flm_photos()
    model = replace(run.model, reconstructor=None)
    return replace(run, name="mdc_photos", model=model, objectives={"mdc": MDCConfig()})
