from __future__ import annotations

import pytest

from fastvlp.objectives.itm import ITMConfig
from fastvlp.train.optim import OptimConfig, parameter_groups
from fastvlp.train.pretraining import Pretraining
from fastvlp.train.schedule import rate_factor
from tests.made import made_config, made_model, made_tokenizer


def test_groups_follow_the_module_and_leave_no_parameter_out():
    model = made_model(separate_heads=True)
    pretraining = Pretraining(model, {"itm": ITMConfig().build(made_config(), made_tokenizer())})
    groups = parameter_groups(pretraining, OptimConfig(lr=1.0, cross_multiplier=3, head_multiplier=7))
    told = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert len(told) == len(list(pretraining.parameters()))
    assert told[id(model.image.patch.weight)] == (1, 0.01)
    assert told[id(model.image.patch.bias)] == (1, 0)
    assert told[id(model.text.norm.weight)] == (1, 0)
    assert told[id(model.fusion.text_in.weight)] == (3, 0.01)
    assert told[id(model.reconstructor.query_type)] == (3, 0)
    assert told[id(model.reverse_head.vocabulary.weight)] == (7, 0.01)
    assert told[id(pretraining.objectives["itm"].match.bias)] == (7, 0)


@pytest.mark.parametrize("decay", ["linear", "cosine", "constant"])
def test_the_rate_warms_up_and_decays(decay):
    end = 1.0 if decay == "constant" else 0.0
    assert rate_factor(0.0, 0.1, decay) == 0
    assert rate_factor(0.05, 0.1, decay) == 0.5
    assert rate_factor(0.1, 0.1, decay) == 1
    assert rate_factor(1.0, 0.1, decay) == pytest.approx(end)
    assert rate_factor(1.7, 0.1, decay) == pytest.approx(end)
    assert rate_factor(0.55, 0.1, "linear") == pytest.approx(0.5)
