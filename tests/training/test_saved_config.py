"""A config that was saved is read again as it was, with all its parts."""

import json
from dataclasses import dataclass, replace

import pytest

from fastvlp.config import to_json
from fastvlp.errors import UserError
from fastvlp.objectives.flm import FLMConfig
from fastvlp.recipes import names, recipe
from fastvlp.training.saved_config import read_config


@pytest.mark.parametrize("name", names())
def test_every_recipe_is_read_as_it_was_written(name):
    run = recipe(name)
    assert read_config(json.loads(json.dumps(to_json(run))), "x.json") == run


def test_an_objective_of_ones_own_is_read_while_its_class_is_known():
    @dataclass(frozen=True, kw_only=True)
    class OwnConfig(FLMConfig):
        strength: float = 1.0

    run = replace(recipe("flm_demo"), objectives={"own": OwnConfig(strength=2.0)})
    saved = to_json(run)
    assert read_config(saved, "x.json") == run
    saved["objectives"]["own"]["type"] = "NobodysConfig"
    with pytest.raises(UserError, match=r"x\.json.*NobodysConfig"):
        read_config(saved, "x.json")


def test_a_field_that_there_is_not_any_more_is_refused_and_a_newer_one_has_its_default():
    saved = to_json(recipe("flm_demo"))
    del saved["optim"]["decay"]
    assert read_config(saved, "x.json") == recipe("flm_demo")
    saved["optim"]["momentum"] = 0.5
    with pytest.raises(UserError, match=r"x\.json.*optim\.momentum"):
        read_config(saved, "x.json")


def test_a_value_of_another_type_is_refused():
    saved = to_json(recipe("flm_demo")) | {"vocab": "many"}
    with pytest.raises(UserError, match=r"x\.json.*vocab"):
        read_config(saved, "x.json")
