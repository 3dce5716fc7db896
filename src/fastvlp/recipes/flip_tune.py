"""The last steps of a FLIP run, on whole images (arXiv 2212.00794, section A.1), at a hundredth of the learning rate.

    vlp pretrain flip_tune --from runs/flip_photos

The weights and the temperature are those of the first run, the optimiser starts anew. In the paper these steps see a
hundredth of the pairs; here they take a twentieth of the time of flip_photos. Not measured yet.
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
