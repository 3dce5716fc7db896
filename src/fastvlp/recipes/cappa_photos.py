"""CapPa (arXiv 2306.07915) on your own image-text pairs: flm_photos with another objective.

    vlp data import PAIRS --out photos --val 0.1 --max-side 192
    vlp pretrain cappa_photos

Two minutes of one CPU core and a smaller model, three seeds: 24.7 % of the next words (AR 28.5, PrefixLM 27.3, FLM 24.0;
docs/log.md, entry 55).
"""

from dataclasses import replace

from fastvlp.objectives.cappa import CapPaConfig
from fastvlp.recipes.flm_photos import flm_photos
from fastvlp.training.train_config import TrainConfig


def cappa_photos() -> TrainConfig:
    run = flm_photos()
    model = replace(run.model, reconstructor=None)
    return replace(run, name="cappa_photos", model=model, objectives={"cappa": CapPaConfig()})
