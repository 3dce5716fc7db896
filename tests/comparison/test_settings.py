"""`--set` reaches any field of a recipe; a wrong field or value is named, with the nearest fields."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fastvlp.comparison.settings import check_arms, duration, with_settings
from fastvlp.errors import UserError
from fastvlp.recipes import recipe


def test_values_of_every_type() -> None:
    run = replace(recipe("mlm_demo"), steps=3, budget_s=None)
    settings = [
        "optim.lr=3e-4",
        "objectives.mlm.mask_rate=0.2",
        "steps=7",
        "compile=true",
        "precision=fp32",
        "data.train=a=b, c",
        "data.val=none",
        "optim.betas=0.5,0.6",
        "augment.crop=(0.5, 1)",
        "freeze=text.word,image",
        "data.batch-size=5",
        "model.image.size=48",
    ]
    new = with_settings(run, settings, "arm")
    assert (new.optim.lr, new.optim.betas, new.augment.crop) == (3e-4, (0.5, 0.6), (0.5, 1.0))
    assert (new.steps, new.compile, new.precision, new.freeze) == (7, True, "fp32", ("text.word", "image"))
    assert (new.data.train, new.data.val, new.data.batch_size) == ("a=b, c", None, 5)  # type: ignore[attr-defined]
    assert new.objectives["mlm"].mask_rate == 0.2 and new.model.image.size == 48  # type: ignore[attr-defined]
    assert with_settings(new, ["steps=None", "budget_s=9"], "arm").steps is None
    assert with_settings(run, [], "arm") == run


def test_one_arm_alone() -> None:
    run = recipe("flm_demo")
    assert with_settings(run, ["flm_demo:vocab=3"], "flm_demo").vocab == 3
    assert with_settings(run, ["flm_demo:vocab=3"], "mlm_demo") == run
    check_arms(["a:vocab=3", "vocab=4"], ["a", "b"])
    with pytest.raises(UserError, match=r"c:vocab=3.* a, b"):
        check_arms(["c:vocab=3"], ["a", "b"])


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ("optim.rl=1", "optim.lr"),
        ("objectives.fml.span_rate=1", "objectives.flm.span_rate"),
        ("optim=1", "optim.lr"),
        ("steps.x=1", "steps"),
        ("vocab=two", "two"),
        ("data.fit=round", "squash"),
        ("compile=1", "True"),
        ("optim.betas=0.5", "2 values"),
        ("optim.betas=0.5,x", "x"),
        ("optim.lr=-1", "must be above 0"),
        ("data.group=0", "group"),
        ("optim.lr", "FIELD=VALUE"),
    ],
)
def test_a_fault_is_named_with_its_setting(setting: str, named: str) -> None:
    with pytest.raises(UserError) as caught:
        with_settings(recipe("flm_demo"), [setting], "arm")
    assert setting in str(caught.value) and named in str(caught.value).replace(setting, "")


def test_a_size_is_taken_by_its_name() -> None:
    run = with_settings(recipe("mlm_demo"), ["model=small", "model.image.size=64"], "mlm_demo")
    assert with_settings(recipe("mlm_demo"), ["model.image.size=64", "model=small"], "mlm_demo") == run
    assert (run.model.text.width, run.model.image.size, run.model.reconstructor) == (192, 64, None)
    with pytest.raises(UserError, match=r"`set` model=smal: smal: no such size.*small"):
        with_settings(run, ["model=smal"], "mlm_demo")


def test_durations() -> None:
    assert [duration(t) for t in ("90", "120s", "20m", "1.5h")] == [90, 120, 1200, 5400]
    for wrong in ("", "s", "2d", "fast"):
        with pytest.raises(UserError, match=repr(wrong)):
            duration(wrong)
