"""CLIPA's second stage (arXiv 2305.07017): the same weights on images and texts of full size, at a lower rate.

    vlp pretrain clipa_full --from runs/clipa_short

Positions are resized to the finer grid. The rate, a tenth, is ours. Not measured yet.
"""

from dataclasses import replace

from fastvlp.recipes.clip_photos import clip_photos
from fastvlp.training.train_config import TrainConfig


def clipa_full() -> TrainConfig:
    run = clip_photos()
    return replace(
        run,
        name="clipa_full",
        init="runs/clipa_short",
        optim=replace(run.optim, lr=run.optim.lr / 10),
        budget_s=200,
    )
