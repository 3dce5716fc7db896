"""CapPa (arXiv 2306.07915) on your own image-text pairs: flm_photos with another objective.

    vlp data import PAIRS --out photos --val 0.1 --max-side 192
    vlp pretrain cappa_photos

Not measured yet.
"""

from dataclasses import replace

from fastvlp.objectives.cappa import CapPaConfig
from fastvlp.recipes.flm_photos import flm_photos
from fastvlp.training.train_config import TrainConfig


def cappa_photos() -> TrainConfig:
    run = flm_photos()
    model = replace(run.model, reconstructor=None)
    return replace(run, name="cappa_photos", model=model, objectives={"cappa": CapPaConfig()})
