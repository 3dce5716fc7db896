"""FLIP (arXiv 2212.00794) on the embedded corpus: two towers that encode half of each image's patches.

    vlp data demo
    vlp pretrain flip_demo

The published shape, --model flip_tiny_published, had after 900 steps (80 s on two CPU cores) a validation loss of 1.81, and
32.5 % retrieval recall among 1,000 scenes of the test split. CLIP's shape had 39.6 % among 500 scenes of val after 600 steps
(docs/log.md, entry 31).
"""

from dataclasses import replace

from fastvlp.data.pairs import PairData
from fastvlp.model.sizes import flip_tiny
from fastvlp.objectives.clip import CLIPConfig
from fastvlp.training.optim import flip_optim
from fastvlp.training.train_config import TrainConfig


def flip_demo() -> TrainConfig:
    return TrainConfig(
        name="flip_demo",
        data=PairData(train="demo/world/train", val="demo/world/val", batch_size=64, max_length=34),
        model=flip_tiny(),
        objectives={"clip": CLIPConfig(bound="clip")},
        # The paper's rate is for 64 k pairs a step and 190,000 steps.
        optim=replace(flip_optim(64), lr=2e-3, warmup=0.1),
        keep=0.5,
        budget_s=120,
        vocab=500,
        validate_every=200,
        checkpoint_every=200,
    )
