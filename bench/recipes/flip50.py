"""Arm `flip50` of the towers compared in docs/log.md: half of each image's patches, and twice clip.py's batch."""

from dataclasses import replace

from clip import clip

from fastvlp.training.train_config import TrainConfig


def flip50() -> TrainConfig:
    run = clip()
    return replace(run, name="flip50", keep=0.5, data=replace(run.data, batch_size=128))
