"""flip_demo with SimCLR on two augmented views of each image (SLIP, arXiv 2112.12750), on the embedded corpus.

    vlp data demo
    vlp pretrain clip_simclr_demo

Not measured yet.
"""

from dataclasses import replace

from fastvlp.data.augment import AugmentConfig
from fastvlp.objectives.simclr import SimCLRConfig
from fastvlp.recipes.flip_demo import flip_demo
from fastvlp.training.train_config import TrainConfig


def clip_simclr_demo() -> TrainConfig:
    run = flip_demo()
    # The captions name sides and colours, so that a view is neither mirrored nor of another hue.
    views = AugmentConfig(
        crop=(0.5, 1.0), jitter=0.8, strength=(0.4, 0.4, 0.4, 0.0), gray=0.2, blur=0.5, sigma=(0.1, 0.5)
    )
    # Each view is masked like the image, so that a step costs as much as three such images, not five.
    simclr = SimCLRConfig(augment=views, keep=run.keep)
    return replace(run, name="clip_simclr_demo", objectives={**run.objectives, "simclr": simclr})
