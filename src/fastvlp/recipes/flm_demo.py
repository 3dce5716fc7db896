"""Free language modeling (arXiv 2303.14038) on the embedded corpus.

    vlp data demo
    vlp pretrain flm_demo

mlm_demo, ar_demo and prefixlm_demo differ only in the objective. Five minutes on a core of an AMD EPYC with
--model.image.patch 6 and --data.group 8192, three seeds, then 600 steps on questions: 42.1 +- 0.8 % of the answers are
right; ar_demo 38.8 +- 0.5 %, prefixlm_demo 37.8 +- 0.7 %, mlm_demo 37.1 +- 0.6 % (docs/log.md, entry 14).
"""

from fastvlp.data.pairs import PairData
from fastvlp.model.sizes import tiny
from fastvlp.objectives.flm import FLMConfig
from fastvlp.training.optim import OptimConfig
from fastvlp.training.train_config import TrainConfig


def flm_demo() -> TrainConfig:
    return TrainConfig(
        name="flm_demo",
        data=PairData(train="demo/world/train", val="demo/world/val", batch_size=32),
        model=tiny(),
        objectives={"flm": FLMConfig()},
        # No part has trained weights, so all parts learn at the same rate.
        optim=OptimConfig(lr=2e-3, cross_multiplier=1, head_multiplier=1),
        budget_s=120,
        vocab=500,
        validate_every=200,
        checkpoint_every=200,
    )
