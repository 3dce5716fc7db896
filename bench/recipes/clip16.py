"""Arm `clip16` of docs/log.md's comparison of a queue with a batch: clip.py with 16 pairs a step.

vlp compare clip16.py moco16.py --budget 4m --slice 5s --marks 0.5 1 --pictures 0 --threads 1
"""

from dataclasses import replace

from clip import clip

from fastvlp.training.train_config import TrainConfig


def clip16() -> TrainConfig:
    run = clip()
    return replace(run, name="clip16", data=replace(run.data, batch_size=16), budget_s=240)
