"""CLIP (arXiv 2103.00020) on your own image-text pairs: two towers, contrasting the pairs of a batch.

    vlp data import PAIRS --out photos --val 0.1 --max-side 192
    vlp pretrain clip_photos
    vlp pretrain clip_photos --accumulate 8       # contrasts 8 times as many pairs in the same memory

siglip_photos differs in the objective; flip_photos drops half of each image's patches and doubles the batch. docs/log.md,
entry 13, compares six such recipes at equal time.
"""

from fastvlp.data.pairs import PairData
from fastvlp.model.sizes import clip_small
from fastvlp.objectives.clip import CLIPConfig
from fastvlp.training.optim import OptimConfig
from fastvlp.training.train_config import TrainConfig


def clip_photos() -> TrainConfig:
    return TrainConfig(
        name="clip_photos",
        data=PairData(train="photos/train", val="photos/val", batch_size=64),
        model=clip_small(),
        objectives={"clip": CLIPConfig()},
        # No part has trained weights, so all parts learn at the same rate.
        optim=OptimConfig(lr=1e-3, weight_decay=0.2, head_multiplier=1, decay="cosine"),
        vocab=5000,
        budget_s=1200,
        validate_every=100,
        checkpoint_every=100,
    )
