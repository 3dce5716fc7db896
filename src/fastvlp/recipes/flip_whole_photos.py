"""FLIP with its end on whole images in one run (arXiv 2212.00794, section A.1): half of the patches for nine tenths of it.

    vlp data import PAIRS --out photos --val 0.1 --max-side 192
    vlp pretrain flip_whole_photos

All else is as in clip_photos, unlike in flip_photos, which has the optimiser of the paper. Not measured yet.
"""

from dataclasses import replace

from fastvlp.recipes.clip_photos import clip_photos
from fastvlp.training.reduced_start import ReducedStart
from fastvlp.training.train_config import TrainConfig


def flip_whole_photos() -> TrainConfig:
    run = clip_photos()
    reduced = ReducedStart(share=0.9, keep=0.5)
    return replace(run, name="flip_whole_photos", data=replace(run.data, batch_size=128), reduced=reduced)
