"""BriVL on your own image-text pairs: a 6x6 grid and the whole image as in BriVL 2, needing no detector, and the queue of 1.0.

    vlp data import PAIRS --out photos --val 0.1 --max-side 192
    vlp pretrain brivl_photos
    vlp pretrain brivl_photos --objectives.moco.mode batch+queue     # BriVL 2: other pairs of the batch are negatives too

brivl_zh reads Chinese captions, brivl_caption learns to write them, moco_photos has plain heads. In nine minutes it
had a third of clip_photos' recall (docs/log.md, entry 13): queues are for batches that cannot be large.
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
        # Fewer keys than a few thousand photographs, so that hardly any is in the queue when it comes again.
        objectives={"moco": MoCoConfig(queue=2048, warm=True)},
        # Colours change and places stay, as released: boxes would have to move along.
        augment=AugmentConfig(jitter=0.8, gray=0.2),
        # Nothing is trained yet, so that all parts start from the same rate.
        optim=OptimConfig(lr=1e-3, weight_decay=0.05, head_multiplier=1, decay="cosine"),
        vocab=5000,
        budget_s=1200,
        validate_every=100,
        checkpoint_every=100,
    )
