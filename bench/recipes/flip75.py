"""Arm `flip75` of the towers compared in docs/log.md: a quarter of each image's patches, and four times clip.py's batch."""

from dataclasses import replace

from clip import clip

from fastvlp.training.train_config import TrainConfig


def flip75() -> TrainConfig:
    run = clip()
    return replace(run, name="flip75", keep=0.25, data=replace(run.data, batch_size=256))
