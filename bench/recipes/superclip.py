"""Arm `superclip` of the towers compared in docs/log.md: CLIP, and the image predicts the words of its caption (SuperCLIP,
arXiv 2512.14480)."""

from dataclasses import replace

from clip import clip

from fastvlp.objectives.superclip import SuperCLIPConfig
from fastvlp.training.train_config import TrainConfig


def superclip() -> TrainConfig:
    run = clip()
    return replace(run, name="superclip", objectives={**run.objectives, "superclip": SuperCLIPConfig()})
