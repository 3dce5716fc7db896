"""photo_heads with the text encoder trained too, from the heads that photo_heads learned:

vlp pretrain bench/recipes/photo_heads.py
vlp pretrain bench/recipes/photo_tuned.py --from runs/photo_heads
"""

from dataclasses import replace

from photo_heads import photo_heads

from fastvlp.training.train_config import TrainConfig


def photo_tuned() -> TrainConfig:
    run = photo_heads()
    return replace(
        run,
        name="photo_tuned",
        optim=replace(run.optim, lr=3e-4, layer_decay=0.8),
        freeze=("image",),
        text=None,
        steps=120,
        validate_every=60,
    )
