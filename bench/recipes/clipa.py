"""Arm `clipa` of the towers compared in docs/log.md: images of 32 pixels and texts of 10 tokens first, then a tenth of the run
in full (CLIPA, arXiv 2305.07017)."""

from dataclasses import replace

from clip import clip

from fastvlp.training.reduced_start import ReducedStart
from fastvlp.training.train_config import TrainConfig


def clipa() -> TrainConfig:
    run = clip()
    reduced = ReducedStart(share=0.9, size=32, max_length=10)
    return replace(run, name="clipa", reduced=reduced, data=replace(run.data, batch_size=128))
