"""Free language modeling (arXiv 2303.14038) on your own image-text pairs, on a CPU or one GPU.

    vlp data import PAIRS --out photos --val 0.1 --max-side 192
    vlp pretrain flm_photos
    vlp pretrain flm_photos --data.captions captions_zh --name flm_zh     # the same images with Chinese captions

mlm_photos, ar_photos and prefixlm_photos differ only in the objective. On 6,000 photographs, 20 minutes of one busy CPU
core and one seed: 43.7 % of the cloze words (MLM 37.9, AR 34.3, PrefixLM 32.2) and CIDEr 0.122 (0.103, 0.092, 0.092;
docs/log.md, entry 6).
"""

from fastvlp.data.pairs import PairData
from fastvlp.model.sizes import small
from fastvlp.objectives.flm import FLMConfig
from fastvlp.training.optim import OptimConfig
from fastvlp.training.train_config import TrainConfig


def flm_photos() -> TrainConfig:
    return TrainConfig(
        name="flm_photos",
        data=PairData(train="photos/train", val="photos/val", batch_size=32),
        model=small(),
        objectives={"flm": FLMConfig()},
        optim=OptimConfig(lr=7e-4, weight_decay=0.05, cross_multiplier=1, head_multiplier=1),
        vocab=5000,
        budget_s=1200,
        validate_every=200,
        checkpoint_every=200,
    )
