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
    # The captions name sides and colours: neither mirrored scenes nor other hues are the same.
    views = AugmentConfig(
        crop=(0.5, 1.0), jitter=0.8, strength=(0.4, 0.4, 0.4, 0.0), gray=0.2, blur=0.5, sigma=(0.1, 0.5)
    )
    # Each view masked as the image is, so that a step costs three such images and not five.
    simclr = SimCLRConfig(augment=views, keep=run.keep)
    return replace(run, name="clip_simclr_demo", objectives={**run.objectives, "simclr": simclr})
