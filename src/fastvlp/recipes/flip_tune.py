"""The end of a FLIP run on whole images (arXiv 2212.00794, section A.1): a hundredth of the rate, a fifth of it warm-up.

    vlp pretrain flip_tune --from runs/flip_photos

Weights and temperature come along, the optimiser starts anew. The paper tunes for a hundredth of the pairs; here it is a
twentieth of flip_photos' time. Not measured yet.
"""

from dataclasses import replace

from fastvlp.recipes.flip_photos import flip_photos
from fastvlp.training.train_config import TrainConfig


def flip_tune() -> TrainConfig:
    run = flip_photos()
    return replace(
        run,
        name="flip_tune",
        init="runs/flip_photos",
        keep=1.0,
        data=replace(run.data, batch_size=64),
        optim=replace(run.optim, lr=run.optim.lr / 100, warmup=0.2),
        budget_s=60,
    )
