"""BriVL 2 in the released size (arXiv 2110.14378): brivl_base without a detector. Images of 456 pixels are pooled by a grid of
6x6 and the whole image.

    vlp data import PAIRS --out pairs --val 0.01             # Chinese captions
    torchrun --nproc-per-node 8 --no-python vlp pretrain brivl2_base

As in the paper's figure the other pairs of a step are negatives too, beside the queue. All else is that of brivl_base, which
also says how to name other encoders. Not run at this size, so no result.
"""

from dataclasses import replace

from fastvlp.model import sizes
from fastvlp.objectives.moco import MoCoConfig
from fastvlp.recipes.brivl_base import brivl_base, brivl_data
from fastvlp.training.train_config import TrainConfig


def brivl2_base() -> TrainConfig:
    return replace(
        brivl_base(),
        name="brivl2_base",
        # The cells of the grid are the head's own.
        data=brivl_data(None),
        model=sizes.brivl(version=2),
        objectives={"moco": MoCoConfig(mode="batch+queue")},
    )
