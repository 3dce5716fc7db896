"""BriVL 1.0 (arXiv 2103.06561) on the embedded corpus: the boxes of each scene and the whole image, and a queue of keys from a
momentum copy of the model, so that a small batch has many negatives.

    vlp data demo
    vlp pretrain brivl_demo

200 steps, one seed: R@10 of 23 % among 256 pairs in both directions, where chance is 4 % (docs/log.md, entry 11).
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
        # The released queue of 9,600 keys would hold each scene of so small a corpus more than once. It also begins as random
        # vectors: after 200 steps the recall was half of that with a queue that counts only written keys.
        objectives={"moco": MoCoConfig(queue=1024, warm=True)},
        # No part has trained weights, so all parts learn at the same rate.
        optim=OptimConfig(lr=1e-3, head_multiplier=1, warmup=0.1),
        budget_s=120,
        vocab=500,
        validate_every=200,
        checkpoint_every=200,
    )
