"""photo_ar with a text encoder of six layers with public weights, and its 30,522 words."""

from dataclasses import replace

from photo_ar import photo_ar
from public_encoders import minilm

from fastvlp.training.train_config import TrainConfig


def photo_ar_minilm() -> TrainConfig:
    run = photo_ar()
    # The layers that join the encoders are new: they learn at five times the rate of the text encoder.
    optim = replace(run.optim, lr=1.5e-4, cross_multiplier=5, head_multiplier=5)
    return replace(run, name="photo_ar_minilm", optim=optim, text=minilm())
