"""UNITER on the embedded corpus: one stream over words and the scene's objects, one of four tasks a step.

The objects' boxes and class distributions stand for a detector's; a region's feature are its own pixels.

vlp data demo
vlp pretrain uniter_demo

A smoke of 60 s on one busy core (`--budget-s 60 --threads 1`), 467 steps, validation: mlm 3.13 (6.0 at the start), mrfr 0.26
(0.63), mrc_kl 3.26 (3.5); matching is still at chance (0.70). No longer run yet.
"""

from fastvlp.data.regions import RegionSource
from fastvlp.data.rows import PairData
from fastvlp.data.world_scene import COMBINATIONS
from fastvlp.model.sizes import tiny_single
from fastvlp.objectives.mlm import MLMConfig
from fastvlp.objectives.region import MRCConfig, MRFRConfig
from fastvlp.objectives.wra import WRAConfig
from fastvlp.train.optim import OptimConfig
from fastvlp.train.run import TrainConfig


def uniter_demo() -> TrainConfig:
    classes = tuple(f"{colour} {shape}" for colour, shape in COMBINATIONS)
    return TrainConfig(
        name="uniter_demo",
        data=PairData(
            train="demo/world/train",
            val="demo/world/val",
            batch_size=32,
            regions=RegionSource(classes=classes),
        ),
        model=tiny_single(),
        objectives={
            "itm": WRAConfig(),
            "mlm": MLMConfig(mask_rate=0.15, whole_word=False),
            "mrfr": MRFRConfig(),
            "mrc_kl": MRCConfig(classes=len(classes), background=False, reduction="batchmean"),
        },
        # The shares of the paper's pretraining on all its data.
        mix={"itm": 6, "mlm": 8, "mrfr": 4, "mrc_kl": 4},
        # Nothing is trained yet, so that all parts start from the same rate.
        optim=OptimConfig(lr=2e-3, cross_multiplier=1, head_multiplier=1),
        budget_s=120,
        vocab=500,
        validate_every=500,
        checkpoint_every=500,
    )
