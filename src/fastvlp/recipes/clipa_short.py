"""The first stage of CLIPA (arXiv 2305.07017): small images and short texts, so that most pairs are seen at low cost.

    vlp data import PAIRS --out photos --val 0.1 --max-side 192
    vlp pretrain clipa_short
    vlp pretrain clipa_full --from runs/clipa_short

It has 16 patches instead of 49, and 14 words instead of 48. Both stages together take the time of clip_photos. Not measured
yet.
"""

from dataclasses import replace

from fastvlp.model.sizes import clip_small
from fastvlp.recipes.clip_photos import clip_photos
from fastvlp.training.train_config import TrainConfig


def clipa_short() -> TrainConfig:
    run = clip_photos()
    return replace(
        run,
        name="clipa_short",
        data=replace(run.data, batch_size=128, max_length=16),
        model=clip_small(size=64),
        budget_s=1000,
    )
