"""Arm `flip_shape_clip` of docs/log.md, entry 33: FLIP's towers in the shape of CLIP, `flip_tiny` at 64 pixels.

    vlp compare flip_shape_clip.py flip_shape_published.py --budget 2m --seeds 3 --marks 1 --pictures 0 --threads 1

Reads flickr8k/, as `vlp data import` writes it.
"""

from dataclasses import replace

from fastvlp.model.sizes import flip_tiny
from fastvlp.recipes.flip_photos import flip_photos
from fastvlp.training.train_config import TrainConfig


def flip_shape_clip() -> TrainConfig:
    run = flip_photos()
    places = {split: f"flickr8k/{split}" for split in ("train", "val", "test")}
    # The rate of the arms of clip.py: in minutes the recipe's rate, for hours, would teach little.
    optim = replace(run.optim, lr=1e-3)
    return replace(
        run,
        name="flip_shape_clip",
        data=replace(run.data, **places),
        model=flip_tiny(size=64),
        optim=optim,
        precision="bf16",
    )
