"""RECLIP (arXiv 2304.06028): smaller images first, then a tenth of the run on full ones.

    vlp data import PAIRS --out photos --val 0.1 --max-side 192
    vlp pretrain reclip_photos

At first an image has 16 patches instead of 49. The paper trains its two stages one after the other, each with a schedule of its
own; here one schedule covers both. Not measured yet.
"""

from dataclasses import replace

from fastvlp.recipes.clip_photos import clip_photos
from fastvlp.training.reduced_start import ReducedStart
from fastvlp.training.train_config import TrainConfig


def reclip_photos() -> TrainConfig:
    run = clip_photos()
    reduced = ReducedStart(share=0.9, size=64)
    return replace(run, name="reclip_photos", data=replace(run.data, batch_size=128), reduced=reduced)
