"""The paper's run (FLM, arXiv 2303.14038; hyperparameters of TencentARC/FLM's README): 4M pairs, CLIP ViT-B/32 and
RoBERTa-base, 288 px, 30,000 steps of 4,096 pairs.

    torchrun --nproc-per-node 8 --no-python vlp pretrain flm_base --data.train PAIRS/train

Both encoders are fetched from the hub; where it cannot be reached, name folders: `--image CLIP --text ROBERTA`. Fewer ranks:
raise --accumulate in proportion. Not run yet: no result.
"""

from fastvlp.data.pairs import PairData
from fastvlp.model import sizes
from fastvlp.objectives.flm import FLMConfig
from fastvlp.training.optim import OptimConfig
from fastvlp.training.train_config import TrainConfig


def flm_base() -> TrainConfig:
    return TrainConfig(
        name="flm_base",
        data=PairData(train="pairs/train", val="pairs/val", batch_size=64, workers=8, cache=False),
        model=sizes.flm_base(),
        objectives={"flm": FLMConfig()},
        optim=OptimConfig(lr=8e-5, weight_decay=0.01, clip=None, warmup=0.05),
        # All but CLIP's last layer, which is hardly more than a pooling of the states before it (METER, arXiv 2111.02387).
        image="openai/clip-vit-base-patch32",
        image_layers=11,
        text="FacebookAI/roberta-base",
        text_layers=6,
        steps=30_000,
        accumulate=8,
        seed=2022,
        validate_every=1000,
        checkpoint_every=500,
        compile=True,
    )
