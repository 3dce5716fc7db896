"""PrefixLM on your own image-text pairs: flm_photos with another objective.

vlp data import PAIRS --out photos --val 0.1 --max-side 192
vlp pretrain prefixlm_photos

Its scores are beside those of flm_photos (docs/log.md, entry 6).
"""

from dataclasses import replace

from fastvlp.objectives.prefixlm import PrefixLMConfig
from fastvlp.recipes.flm_photos import flm_photos
from fastvlp.training.train_config import TrainConfig


def prefixlm_photos() -> TrainConfig:
    run = flm_photos()
    return replace(
        run,
        name="prefixlm_photos",
        model=replace(run.model, reconstructor=None),
        objectives={"prefixlm": PrefixLMConfig()},
    )
