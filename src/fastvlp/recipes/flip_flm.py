"""Free language modeling that encodes half of each image's patches, as FLIP does (arXiv 2212.00794): flm_photos with `keep`.

    vlp data import PAIRS --out photos --val 0.1 --max-side 192
    vlp pretrain flip_flm

Not measured yet.
"""

from dataclasses import replace

from fastvlp.recipes.flm_photos import flm_photos
from fastvlp.training.train_config import TrainConfig


def flip_flm() -> TrainConfig:
    return replace(flm_photos(), name="flip_flm", keep=0.5)
