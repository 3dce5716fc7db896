"""BriVL 1.0 in the released size (arXiv 2103.06561; BAAI-WuDao/BriVL bb8d95b): an EfficientNet-B5 at 380 pixels, whose map is
pooled at a detector's boxes and the whole image, a Chinese RoBERTa, and queues of 9,600 keys.

    vlp data import PAIRS --out pairs --val 0.01             # Chinese captions, and boxes as objects
    torchrun --nproc-per-node 8 --no-python vlp pretrain brivl_base

Both encoders are fetched from the hub; where it cannot be reached, name folders: `--image B5 --text ROBERTA`. Also for other
encoders, for which the parts that are trained are then named too:

    vlp pretrain brivl_base --image CNN --freeze --train-last.image 2                       # its last two stages
    vlp pretrain brivl_base --image CNN --freeze image --train-last.image None              # the CNN as it is

With a frozen CNN and `--augment.jitter 0 --augment.gray 0` its maps are stored, and not computed at each step.

As released: the size; which parts are trained (the stages 4 to 7 of the CNN, the last four layers of the RoBERTa, and the
heads); which regions are pooled; the queue, its momentum and temperature; colours that change. Other than released: samples
lie within their box (`model.embed.image.regions.place`); batch norms keep the statistics of the weights that the run starts
from, in the momentum copy too; and words do not attend to padding. docs/why.md has the reasons. Neither the release nor what
could be read of the paper says with which optimiser, rate and batch it was trained: these are ALBEF's rate and decay (arXiv
2107.07651), and a batch that fits. brivl2_base needs no boxes.

Not run at this size, so no result; bench/published_sizes.py takes two steps of it.
"""

from fastvlp.data.augment import AugmentConfig
from fastvlp.data.pairs import PairData
from fastvlp.data.regions import RegionSource
from fastvlp.model import sizes
from fastvlp.objectives.moco import MoCoConfig
from fastvlp.training.optim import OptimConfig
from fastvlp.training.train_config import TrainConfig
from fastvlp.training.trained_parts import LastLayers


def brivl_data(regions: RegionSource | None) -> PairData:
    return PairData(
        train="pairs/train",
        val="pairs/val",
        batch_size=64,
        max_length=80,
        workers=8,
        cache=False,
        # Boxes are scaled along both sides separately, and a crop would leave some out.
        fit="squash",
        captions="captions_zh",
        regions=regions,
    )


def brivl_base() -> TrainConfig:
    return TrainConfig(
        name="brivl_base",
        data=brivl_data(RegionSource(whole=True, empty="whole")),
        model=sizes.brivl(version=1),
        objectives={"moco": MoCoConfig()},
        augment=AugmentConfig(jitter=0.8, gray=0.2),
        optim=OptimConfig(lr=1e-4, weight_decay=0.02, head_multiplier=1, warmup=0.01, decay="cosine"),
        image="google/efficientnet-b5",
        text="hfl/chinese-roberta-wwm-ext",
        # 26 blocks are in the last four of seven stages. What follows them, a convolution, was not trained either.
        train_last=LastLayers(image=26, text=4),
        freeze=("image.model.encoder.top_conv", "image.model.encoder.top_bn"),
        steps=200_000,
        validate_every=5000,
        checkpoint_every=1000,
    )
