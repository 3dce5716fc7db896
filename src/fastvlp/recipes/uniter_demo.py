"""UNITER (arXiv 1909.11740) on the embedded corpus: a single stream over words and regions; each step runs one of four
objectives.

    vlp data demo
    vlp pretrain uniter_demo

The regions are those of an imitated detector (data/world/detector.py): a feature and shares of classes for each object.

After 4,800 steps (about 5 minutes on one CPU core) the validation losses are: matching 0.08 (0.70 at the start), masked
words 0.83 (6.0), masked classes 1.61 (3.4), features 0.78. docs/log.md, entry 19, has the scores of nine tasks that start
from it.
"""

from fastvlp.data.pairs import PairData
from fastvlp.data.regions import RegionSource
from fastvlp.data.world.detector import WIDTH
from fastvlp.data.world.scene import COMBINATIONS
from fastvlp.model.sizes import tiny_single
from fastvlp.objectives.mlm import MLMConfig
from fastvlp.objectives.region import MRCConfig, MRFRConfig
from fastvlp.objectives.wra import WRAConfig
from fastvlp.training.optim import OptimConfig
from fastvlp.training.train_config import TrainConfig


def uniter_demo() -> TrainConfig:
    return TrainConfig(
        name="uniter_demo",
        data=PairData(
            train="demo/world/train",
            val="demo/world/val",
            batch_size=32,
            regions=RegionSource(stored=True),
        ),
        model=tiny_single(feature=WIDTH),
        objectives={
            "itm": WRAConfig(),
            "mlm": MLMConfig(mask_rate=0.15, whole_word=False),
            "mrfr": MRFRConfig(),
            "mrc_kl": MRCConfig(classes=len(COMBINATIONS), background=False, reduction="batchmean"),
        },
        # The shares that the paper uses when it pretrains on all its data.
        mix={"itm": 6, "mlm": 8, "mrfr": 4, "mrc_kl": 4},
        # At 2e-3 the stream learns to overlook the regions before it can use them: their place vectors become all alike, and
        # what is fine-tuned from it never sees them again (docs/log.md, entry 16).
        optim=OptimConfig(lr=7e-4, cross_multiplier=1, head_multiplier=3),
        budget_s=300,
        vocab=500,
        validate_every=500,
        checkpoint_every=500,
    )
