"""The parts of the model that a step uses, for ranks that wait for each other's gradients."""

from __future__ import annotations

import pytest

from fastvlp.model.model import VLModel
from fastvlp.objectives.ar import ARConfig
from fastvlp.objectives.flm import FLMConfig
from fastvlp.objectives.itm import ITMConfig
from fastvlp.objectives.mlm import MLMConfig
from fastvlp.objectives.objective import combine
from fastvlp.objectives.prefixlm import PrefixLMConfig
from fastvlp.training.pretraining import Pretraining
from tests.made import made_batch, made_config, made_tokenizer

CONFIGS = {
    "flm": FLMConfig(),
    "reverse": FLMConfig(span_mode="uniform", span_rate=0.4, forward_weight=0),
    "reconstruct": FLMConfig(forward_weight=0, reverse_weight=0),
    "mlm": MLMConfig(),
    "ar": ARConfig(),
    "prefixlm": PrefixLMConfig(),
    "itm": ITMConfig(),
}


@pytest.mark.parametrize("separate_heads", [False, True])
@pytest.mark.parametrize("reconstructor", [False, True])
@pytest.mark.parametrize("names", [*((name,) for name in CONFIGS), ("flm", "mlm"), ("mlm", "ar"), ("itm", "flm")])
def test_a_step_uses_all_where_it_is_said_to(names, reconstructor, separate_heads):
    if not reconstructor and {"flm", "reverse", "reconstruct"} & set(names):
        pytest.skip("FLM needs a reconstructor")
    config = made_config(depth=1, reconstructor=reconstructor, separate_heads=separate_heads)
    objectives = {name: CONFIGS[name].build(config, made_tokenizer()) for name in names}
    pretraining = Pretraining(VLModel(config), objectives)
    unused = []
    for lengths in ((5, 9, 3), (2, 2)):
        pretraining.zero_grad()
        combine(pretraining(made_batch(lengths=lengths))).backward()
        unused += [name for name, p in pretraining.named_parameters() if p.grad is None]
    if separate_heads or "itm" in names:
        assert not pretraining.uses_all()
    else:
        assert pretraining.uses_all() == (not unused)
