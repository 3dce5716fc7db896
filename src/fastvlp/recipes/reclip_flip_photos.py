"""Smaller images and half of their patches first (RECLIP, arXiv 2304.06028; FLIP, 2212.00794), then full ones.

    vlp data import PAIRS --out photos --val 0.1 --max-side 192
    vlp pretrain reclip_flip_photos

At first 12 of the 25 patches of an image of 80 pixels are encoded, at the end all 49 of 112 pixels. Not measured yet.
"""

from dataclasses import replace

from fastvlp.recipes.clip_photos import clip_photos
from fastvlp.training.reduced_start import ReducedStart
from fastvlp.training.train_config import TrainConfig


def reclip_flip_photos() -> TrainConfig:
    run = clip_photos()
    reduced = ReducedStart(share=0.9, size=80, keep=0.5)
    return replace(run, name="reclip_flip_photos", data=replace(run.data, batch_size=128), reduced=reduced)
