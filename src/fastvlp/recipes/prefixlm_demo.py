"""PrefixLM on the embedded corpus: flm_demo with another objective.

vlp data demo
vlp pretrain prefixlm_demo

Its scores are beside those of flm_demo (docs/log.md, entry 14).
"""

from dataclasses import replace

from fastvlp.model.sizes import tiny
from fastvlp.objectives.prefixlm import PrefixLMConfig
from fastvlp.recipes.flm_demo import flm_demo
from fastvlp.training.train_config import TrainConfig


def prefixlm_demo() -> TrainConfig:
    return replace(
        flm_demo(), name="prefixlm_demo", model=tiny(reconstructor=False), objectives={"prefixlm": PrefixLMConfig()}
    )
