"""photo_heads with the text encoder trained too, at a lower rate, from the start: heads that have learned the training images
by heart leave it little to learn (docs/log.md, entry 23)."""

from dataclasses import replace

from photo_heads import photo_heads

from fastvlp.training.train_config import TrainConfig


def photo_tuned() -> TrainConfig:
    run = photo_heads()
    optim = replace(run.optim, layer_decay=0.8, parts={"text": 0.3})
    # 8 epochs.
    return replace(run, name="photo_tuned", optim=optim, freeze=("image", "text.word"), steps=94)
