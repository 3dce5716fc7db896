"""BriVL that also writes: layers in which the text reads the image, and a loss of each next word, on the same towers.

    vlp pretrain brivl_caption
    vlp finetune caption --from runs/brivl_caption --data photos

The images are encoded once for both losses. The towers alone still embed. Not measured yet.
"""

from dataclasses import replace

from fastvlp.model.sizes import brivl_small, small
from fastvlp.objectives.ar import ARConfig
from fastvlp.recipes.brivl_photos import brivl_photos
from fastvlp.training.train_config import TrainConfig


def brivl_caption() -> TrainConfig:
    run = brivl_photos()
    return replace(
        run,
        name="brivl_caption",
        model=replace(small(reconstructor=False), embed=brivl_small().embed),
        # The first says how captioning reads the text: from the left.
        objectives={"ar": ARConfig(), **run.objectives},
        optim=replace(run.optim, cross_multiplier=1),
    )
