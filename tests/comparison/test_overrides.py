"""`--set` reaches any field, and says what is near when there is none."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import pytest

from fastvlp.comparison.overrides import duration, override
from fastvlp.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Inner:
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.98)

    def __post_init__(self) -> None:
        if self.lr < 0:
            raise ValueError("lr is at least 0")


@dataclass(frozen=True, kw_only=True)
class Outer:
    optim: Inner = Inner()
    parts: Mapping[str, Inner]
    steps: int | None = None
    flag: bool = False
    mode: Literal["a", "b"] = "a"
    train: str = "x"
    val: str | None = None


CONFIG = Outer(parts={"flm": Inner()})


def test_fields_of_every_kind() -> None:
    settings = ["optim.lr=3e-4", "parts.flm.lr=2", "steps=7", "flag=true", "mode=b", "train=a=b", "val=7"]
    new = override(CONFIG, [*settings, "optim.betas=0.5,0.6"], "arm")
    inner = Inner(lr=3e-4, betas=(0.5, 0.6))
    parts = {"flm": Inner(lr=2)}
    assert new == Outer(optim=inner, parts=parts, steps=7, flag=True, mode="b", train="a=b", val="7")
    assert override(new, ["steps=none", "val=none"], "arm").steps is None


def test_one_arm_alone() -> None:
    assert override(CONFIG, ["flm_demo:steps=3"], "flm_demo").steps == 3
    assert override(CONFIG, ["flm_demo:steps=3"], "mlm_demo").steps is None


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("optim.rl=1", "nearest: lr"),
        ("parts.fml.lr=1", "nearest: flm"),
        ("optim=1", "choose one of its fields"),
        ("steps.x=1", "no fields"),
        ("steps=two", "not of type"),
        ("mode=c", "not of type"),
        ("flag=1", "not of type"),
        ("optim.betas=0.5", "not of type"),
        ("optim.lr=-1", "at least 0"),
        ("optim.lr", "FIELD=VALUE"),
    ],
)
def test_what_is_wrong_is_named(setting: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        override(CONFIG, [setting], "arm")


def test_durations() -> None:
    assert [duration(t) for t in ("90", "120s", "20m", "1.5h")] == [90, 120, 1200, 5400]
    for wrong in ("", "s", "2d", "fast"):
        with pytest.raises(UserError, match="no duration"):
            duration(wrong)
