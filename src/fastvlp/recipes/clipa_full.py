"""The second stage of CLIPA (arXiv 2305.07017): the weights of clipa_short go on with images and texts of full size.

    vlp pretrain clipa_full --from runs/clipa_short

The positions are resized to the finer grid. The learning rate, a tenth of the first stage's, is our choice. Not measured
yet.
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
