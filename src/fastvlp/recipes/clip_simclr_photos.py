"""CLIP with SimCLR as an image term (SLIP, arXiv 2112.12750) on your own image-text pairs: clip_photos with two augmented views
of each image, so that three images are encoded for each pair.

    vlp data import PAIRS --out photos --val 0.1 --max-side 192
    vlp pretrain clip_simclr_photos
    vlp pretrain clip_simclr_photos --objectives.simclr.keep 0.5      # encodes half of each view's patches

At equal time its retrieval recall was lower: 4.3 %, where clip_photos had 6.4 % (docs/log.md, entry 13).
"""

from dataclasses import replace

from fastvlp.data.augment import AugmentConfig
from fastvlp.objectives.simclr import NATURAL, SimCLRConfig
from fastvlp.recipes.clip_photos import clip_photos
from fastvlp.training.train_config import TrainConfig


def clip_simclr_photos() -> TrainConfig:
    run = clip_photos()
    return replace(
        run,
        name="clip_simclr_photos",
        objectives={
            **run.objectives,
            # The same blur in proportion as the paper's, which is for images of 224 pixels.
            "simclr": SimCLRConfig(augment=replace(NATURAL, sigma=(0.05, 1.0))),
        },
        # SLIP's augmentation of the image that is paired with the caption.
        augment=AugmentConfig(crop=(0.5, 1.0)),
    )
