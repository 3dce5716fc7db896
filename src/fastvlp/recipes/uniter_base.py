"""The run of the UNITER paper (arXiv 1909.11740; settings of ChenRocks/UNITER 1dbfa62, all data, base): a single stream like
BERT-base over words and a detector's regions, 8 GPUs, 200,000 steps of 6 x 10,240 tokens on each.

    vlp data import PAIRS --features REGIONS --images blank --out detected --val 0.01
    vlp convert bert-base-cased bert_base --layout uniter_start
    torchrun --nproc-per-node 8 --no-python vlp pretrain uniter_base

With fewer ranks raise --accumulate in proportion. Not run at this size, so no result.

As in the released code: the losses (means over the numbers of a feature and over classes; wrong pairs are pushed apart),
and how a batch is filled (`data.fill`), which leaves more than half of the token budget unused; the learning rate is meant
for it. `--data.fill None --data.max-tokens 5120` trains on about as many rows in full batches.

Other than in the released code: gradients are the mean over the micro-batches of a step, not their sum; texts of more than
60 pieces are cut, not dropped; a wrong pair's image comes from the same batch; and each image counts once, whichever data
set it is from, so that the sets have 2, 2, 71 and 24 % of the rows, not 20, 30, 30 and 20 % (COCO, Visual Genome,
Conceptual Captions, SBU).
"""

from fastvlp.data.pairs import PairData
from fastvlp.data.regions import RegionSource
from fastvlp.model import sizes
from fastvlp.objectives.mlm import MLMConfig
from fastvlp.objectives.region import MRCConfig, MRFRConfig
from fastvlp.objectives.wra import WRAConfig
from fastvlp.training.optim import OptimConfig
from fastvlp.training.train_config import TrainConfig


def uniter_base() -> TrainConfig:
    return TrainConfig(
        name="uniter_base",
        data=PairData(
            train="detected/train",
            val="detected/val",
            batch_size=64,
            max_length=62,
            workers=8,
            cache=False,
            # A crop would leave regions out.
            fit="squash",
            regions=RegionSource(stored=True, confidence=0.2, least=10, most=100),
            group=8192,
            max_tokens=10_240,
            fill="official",
        ),
        model=sizes.uniter_base(),
        objectives={
            "itm": WRAConfig(),
            "mlm": MLMConfig(mask_rate=0.15, whole_word=False),
            "mrfr": MRFRConfig(),
            "mrc_kl": MRCConfig(classes=1601),
        },
        mix={"itm": 6, "mlm": 8, "mrfr": 4, "mrc_kl": 4},
        optim=OptimConfig(lr=5e-5, eps=1e-6, clip=5.0, warmup=0.05, cross_multiplier=1, head_multiplier=1),
        init="bert_base",
        steps=200_000,
        accumulate=6,
        seed=42,
        validate_every=5000,
        checkpoint_every=1000,
    )
