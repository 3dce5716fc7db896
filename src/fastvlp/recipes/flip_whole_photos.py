"""FLIP with its end on whole images in one run (arXiv 2212.00794, section A.1): half of the patches for nine tenths of it.

    vlp data import PAIRS --out photos --val 0.1 --max-side 192
    vlp pretrain flip_whole_photos

All else is as in clip_photos, unlike in flip_photos, which has the optimiser of the paper. With smaller towers,
four minutes of a CPU core and 6,000 photographs, a recall of 3.5 ± 0.1 % (clip_photos 2.9 ± 0.1 %; docs/log.md, entry 56).
"""

from dataclasses import replace

from fastvlp.recipes.clip_photos import clip_photos
from fastvlp.training.reduced_start import ReducedStart
from fastvlp.training.train_config import TrainConfig


def flip_whole_photos() -> TrainConfig:
    run = clip_photos()
    reduced = ReducedStart(share=0.9, keep=0.5)
    return replace(run, name="flip_whole_photos", data=replace(run.data, batch_size=128), reduced=reduced)
