"""UNITER (arXiv 1909.11740) on photographs without a detector: the regions are a grid of boxes, pooled from an image tower
that is trained along.

    vlp data import PAIRS --out photos --val 0.1 --max-side 192
    vlp pretrain uniter_end2end

If your data has boxes, use `--data.regions.grid None`; records without any are then dropped, or shown whole with
`--data.regions.empty whole`. The targets of masked regions change while the tower learns, and the states around a hidden
region have seen it in the tower. So the model learns mostly from words and matching.

With a smaller model and after 1,000 s of one CPU core (790 steps of 64 pairs) the validation loss of masked words is 4.8,
and matching is at chance (0.69). That is far too short to help a task (docs/log.md, entry 18).
"""

from fastvlp.data.pairs import PairData
from fastvlp.data.regions import RegionSource
from fastvlp.model.sizes import single_over_patches, small
from fastvlp.objectives.mlm import MLMConfig
from fastvlp.objectives.region import MRFRConfig
from fastvlp.objectives.wra import WRAConfig
from fastvlp.training.optim import OptimConfig
from fastvlp.training.train_config import TrainConfig


def uniter_end2end() -> TrainConfig:
    return TrainConfig(
        name="uniter_end2end",
        data=PairData(train="photos/train", val="photos/val", batch_size=32, regions=RegionSource(grid=4)),
        model=single_over_patches(small(reconstructor=False)),
        objectives={
            "itm": WRAConfig(),
            "mlm": MLMConfig(mask_rate=0.15, whole_word=False),
            "mrfr": MRFRConfig(),
        },
        mix={"itm": 6, "mlm": 8, "mrfr": 4},
        optim=OptimConfig(lr=7e-4, weight_decay=0.05, cross_multiplier=1, head_multiplier=1),
        vocab=5000,
        budget_s=1200,
        validate_every=200,
        checkpoint_every=200,
    )
