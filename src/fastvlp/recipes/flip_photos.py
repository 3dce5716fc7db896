"""FLIP (arXiv 2212.00794) on your own image-text pairs: half of each image's patches, and twice as many pairs a step.

    vlp data import PAIRS --out photos --val 0.1 --max-side 192
    vlp pretrain flip_photos
    vlp pretrain flip_tune --from runs/flip_photos      # then a few steps on whole images

The model has CLIP's shape, which other tools load; `--model flip_small_published` has the paper's. As in the released code,
images are mirrored at random; if captions distinguish left and right, add `--augment.flip 0`. On whole images train clip_photos
or siglip_photos. In nine minutes on one CPU core, with smaller towers of whose states the mean was taken, and 6,000 photos,
it had the best retrieval recall on the split val: 8.4 %, where clip_photos had 6.4 % (docs/log.md, entry 13).
"""

from dataclasses import replace

from fastvlp.data.augment import AugmentConfig
from fastvlp.data.pairs import PairData
from fastvlp.model.sizes import flip_small
from fastvlp.objectives.clip import CLIPConfig
from fastvlp.training.optim import flip_optim
from fastvlp.training.train_config import TrainConfig


def flip_photos() -> TrainConfig:
    return TrainConfig(
        name="flip_photos",
        # A caption of a photograph has a dozen words. At this size the paper's 32 would cost as much as the masked image.
        data=PairData(train="photos/train", val="photos/val", batch_size=128, max_length=22),
        model=flip_small(),
        objectives={"clip": CLIPConfig(bound="clip")},
        # The paper's rate is for 64 k pairs a step and 190,000 steps.
        optim=replace(flip_optim(128), lr=3e-4, warmup=0.1),
        keep=0.5,
        augment=AugmentConfig(crop=(0.5, 1.0), flip=0.5),
        vocab=5000,
        budget_s=1200,
        validate_every=100,
        checkpoint_every=100,
    )
