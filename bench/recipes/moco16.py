"""Arm `moco16` of docs/log.md's comparison of a queue with a batch: clip16.py's towers and a queue of 2,048 keys."""

from dataclasses import replace

from clip16 import clip16

from fastvlp.objectives.moco import MoCoConfig
from fastvlp.training.train_config import TrainConfig


def moco16() -> TrainConfig:
    return replace(clip16(), name="moco16", objectives={"moco": MoCoConfig(queue=2048, warm=True)})
