"""BriVL 1.0 (arXiv 2103.06561) on the embedded corpus: each scene's boxes and the whole image, keys of a momentum copy, and
a queue of earlier ones, so that a small batch has many negatives.

    vlp data demo
    vlp pretrain brivl_demo

A first look (docs/log.md, entry 11): 200 steps, one seed: R@10 of 23 % among 256 pairs, both ways (chance: 4).
"""

from fastvlp.data.pairs import PairData
from fastvlp.data.regions import RegionSource
from fastvlp.model.sizes import brivl_tiny
from fastvlp.objectives.moco import MoCoConfig
from fastvlp.training.optim import OptimConfig
from fastvlp.training.train_config import TrainConfig


def brivl_demo() -> TrainConfig:
    return TrainConfig(
        name="brivl_demo",
        data=PairData(
            train="demo/world/train",
            val="demo/world/val",
            batch_size=32,
            regions=RegionSource(whole=True, empty="whole"),
        ),
        model=brivl_tiny(),
        # The released queue of 9,600 holds each scene of so small a corpus more than once, and begins as random vectors: in
        # 200 steps half as good as one that counts what was written.
        objectives={"moco": MoCoConfig(queue=1024, warm=True)},
        # Nothing is trained yet, so that all parts start from the same rate.
        optim=OptimConfig(lr=1e-3, head_multiplier=1, warmup=0.1),
        budget_s=120,
        vocab=500,
        validate_every=200,
        checkpoint_every=200,
    )
