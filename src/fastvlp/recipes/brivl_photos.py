"""BriVL on your own image-text pairs, without a detector: the regions are a grid of 6x6 and the whole image, as in BriVL 2
(arXiv 2110.14378), and the negatives a queue, as in BriVL 1.0 (arXiv 2103.06561).

    vlp data import PAIRS --out photos --val 0.1 --max-side 192
    vlp pretrain brivl_photos
    vlp pretrain brivl_photos --objectives.moco.mode batch+queue     # as BriVL 2: the batch's other pairs are negatives too

brivl_zh reads Chinese captions, brivl_caption also writes captions, and moco_photos has simpler heads. In nine minutes it
reached a third of the recall of clip_photos (docs/log.md, entry 13): a queue is of use where batches cannot be large.
"""

from fastvlp.data.augment import AugmentConfig
from fastvlp.data.pairs import PairData
from fastvlp.model.sizes import brivl_small
from fastvlp.objectives.moco import MoCoConfig
from fastvlp.training.optim import OptimConfig
from fastvlp.training.train_config import TrainConfig


def brivl_photos() -> TrainConfig:
    return TrainConfig(
        name="brivl_photos",
        data=PairData(train="photos/train", val="photos/val", batch_size=32, fit="squash"),
        model=brivl_small(),
        # With fewer keys than photographs, hardly any photograph is still in the queue when it is read again.
        objectives={"moco": MoCoConfig(queue=2048, warm=True)},
        # Only colours change, as in the released code: with a crop, boxes would have to move along.
        augment=AugmentConfig(jitter=0.8, gray=0.2),
        # No part has trained weights, so all parts learn at the same rate.
        optim=OptimConfig(lr=1e-3, weight_decay=0.05, head_multiplier=1, decay="cosine"),
        vocab=5000,
        budget_s=1200,
        validate_every=100,
        checkpoint_every=100,
    )
