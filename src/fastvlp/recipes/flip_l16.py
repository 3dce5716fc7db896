"""The run of the FLIP paper (arXiv 2212.00794, tables 9 and 10; facebookresearch/flip): ViT-L/16 on LAION-400M with half of
each image's patches, 190,000 steps of 65,536 pairs.

    torchrun --nproc-per-node 8 --no-python vlp pretrain flip_l16 --data.train PAIRS/train --tokenizer bert/tokenizer.json

The paper then trains 1,900 steps on whole images: run the command again with `--name flip_l16_tuned --from runs/flip_l16
--keep 1 --steps 1900 --optim.lr 1.024e-5 --optim.warmup 0.2`.

With fewer ranks raise --accumulate in proportion: the gradients remain those of the whole batch. Not run yet, so no result.
"""

from fastvlp.data.augment import AugmentConfig
from fastvlp.data.pairs import PairData
from fastvlp.model import sizes
from fastvlp.objectives.clip import CLIPConfig
from fastvlp.training.optim import flip_optim
from fastvlp.training.train_config import TrainConfig


def flip_l16() -> TrainConfig:
    return TrainConfig(
        name="flip_l16",
        data=PairData(train="pairs/train", val="pairs/val", batch_size=256, max_length=34, workers=8, cache=False),
        model=sizes.flip_l16_published(),
        objectives={"clip": CLIPConfig(bound="clip")},
        optim=flip_optim(65_536),
        keep=0.5,
        augment=AugmentConfig(crop=(0.5, 1.0), flip=0.5),
        tokenizer="bert/tokenizer.json",
        steps=190_000,
        accumulate=32,
        validate_every=1000,
        checkpoint_every=500,
        compile=True,
    )
