"""BriVL that also writes captions: brivl_photos with layers in which the text reads the image, and a next-word loss.

    vlp data import PAIRS --out photos --val 0.1 --max-side 192
    vlp pretrain brivl_caption
    vlp finetune caption --from runs/brivl_caption --data photos

Each image is encoded once for both losses, and the two towers still embed images and texts. Not measured yet.
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
        # The first objective says how tasks read the text: left to right.
        objectives={"ar": ARConfig(), **run.objectives},
        optim=replace(run.optim, cross_multiplier=1),
    )
