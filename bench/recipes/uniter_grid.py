"""UNITER on photographs without a detector, as in docs/log.md: uniter_end2end with a small image tower.

    vlp pretrain uniter_grid.py --budget-s 1000

The image tower has 4 layers of width 128 (64 px in patches of 8) and the stream is as deep as clip.py's text tower and
flip_clip_flm.py's fusion together. Written down from the log's description: the original file was not kept, so that numbers
may differ in detail.
"""

from dataclasses import replace

from flip_clip_flm import flip_clip_flm

from fastvlp.model.sizes import single_over_patches
from fastvlp.recipes.uniter_end2end import uniter_end2end
from fastvlp.training.train_config import TrainConfig


def uniter_grid() -> TrainConfig:
    run = uniter_end2end()
    data = replace(run.data, train="flickr8k/train", val="flickr8k/val", test="flickr8k/test", batch_size=64)
    model = replace(flip_clip_flm().model, reconstructor=None, embed=None)
    return replace(
        run, name="uniter_grid", data=data, model=single_over_patches(model), budget_s=1000, precision="bf16"
    )
