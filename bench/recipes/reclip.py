"""Arm `reclip` of the towers compared in docs/log.md: images of 32 pixels first, then a tenth of the run on full ones (RECLIP,
arXiv 2304.06028)."""

from dataclasses import replace

from clip import clip

from fastvlp.training.reduced_start import ReducedStart
from fastvlp.training.train_config import TrainConfig


def reclip() -> TrainConfig:
    run = clip()
    return replace(run, name="reclip", reduced=ReducedStart(share=0.9, size=32), data=replace(run.data, batch_size=128))
