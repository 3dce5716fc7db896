"""Arm `flip50_whole` of the towers compared in docs/log.md: half of the patches first, then a tenth of the run on whole
images."""

from dataclasses import replace

from clip import clip

from fastvlp.training.reduced_start import ReducedStart
from fastvlp.training.train_config import TrainConfig


def flip50_whole() -> TrainConfig:
    run = clip()
    return replace(
        run, name="flip50_whole", reduced=ReducedStart(share=0.9, keep=0.5), data=replace(run.data, batch_size=128)
    )
