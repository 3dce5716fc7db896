"""Arm `superclip_flip50` of the towers compared in docs/log.md: SuperCLIP on half of each image's patches."""

from dataclasses import replace

from flip50 import flip50
from superclip import superclip

from fastvlp.training.train_config import TrainConfig


def superclip_flip50() -> TrainConfig:
    return replace(flip50(), name="superclip_flip50", objectives=superclip().objectives)
