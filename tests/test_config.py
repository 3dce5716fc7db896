from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from fastvlp.config import Count, Positive, ShareBelowOne, check_numbers, differences, show, to_json
from fastvlp.errors import UserError


@dataclass(frozen=True)
class Inner:
    rate: float = 0.5


@dataclass(frozen=True)
class Outer:
    parts: dict[str, Inner]
    sizes: tuple[int, int] = (1, 2)
    file: Path = Path("a/b")


def test_a_config_survives_json():
    saved = to_json(Outer(parts={"x": Inner()}))
    assert saved == {
        "type": "Outer",
        "parts": {"x": {"type": "Inner", "rate": 0.5}},
        "sizes": [1, 2],
        "file": "a/b",
    }
    assert json.loads(json.dumps(saved)) == saved


def test_differences_are_named_as_the_command_line_names_them():
    old, new = to_json(Outer(parts={"x": Inner()})), to_json(Outer(parts={"x": Inner(rate=1.0), "y": Inner()}))
    assert differences(old, new)["parts.x.rate"] == (0.5, 1.0)
    assert differences(old, new)["parts.y.rate"] == (None, 0.5)
    assert differences(old, old) == {}


def test_show_has_a_line_for_each_field():
    assert show(Outer(parts={"x": Inner()})) == "parts:\n  x: Inner(rate=0.5)\nsizes: [1, 2]\nfile: a/b"


def test_show_has_a_mapping_of_numbers_on_the_line_of_its_owner():
    @dataclass(frozen=True)
    class Rates:
        of: dict[str, float]

    assert show(Outer(parts={"x": Rates({"text": 0.1})})).startswith("parts:\n  x: Rates(of={'text': 0.1})\nsizes")


def test_what_is_no_config_is_refused():
    with pytest.raises(TypeError, match="object"):
        to_json({"a": object()})


@dataclass(frozen=True)
class Bounded:
    rate: Positive = 1.0
    pair: tuple[ShareBelowOne, ShareBelowOne] = (0.9, 0.99)
    free: float = 0.0


@dataclass(frozen=True)
class Whole:
    inner: Bounded = Bounded()
    count: Count | None = None
    mix: Mapping[str, Positive] | None = None


@pytest.mark.parametrize(
    ("config", "names"),
    [
        (Whole(inner=Bounded(rate=math.inf)), {"inner.rate"}),
        (Whole(inner=Bounded(rate=0)), {"inner.rate"}),
        (Whole(inner=Bounded(pair=(0.9, 1.0))), {"inner.pair"}),
        (Whole(inner=Bounded(free=math.nan, rate=-1)), {"inner.free", "inner.rate"}),
        (Whole(count=0), {"count"}),
        (Whole(count=1 << 60), {"count"}),
        (Whole(mix={"a": 1.0, "b": -2.0}), {"mix"}),
    ],
)
def test_numbers_out_of_their_range_are_named(config, names) -> None:
    check_numbers(Whole(count=1, mix={"a": 1.0}))
    with pytest.raises(UserError) as refused:
        check_numbers(config)
    assert {*re.findall(r"`([a-z.]+)`", str(refused.value))} == names


def test_the_remedy_for_a_missing_extra_is_that_of_the_installation(monkeypatch):
    from types import SimpleNamespace

    from fastvlp import errors

    origins = {
        "checkout": '{"url": "file:///x", "dir_info": {"editable": true}}',
        "index": None,
        "wheel": '{"url": "x"}',
    }
    found = {}
    for name, text in origins.items():
        monkeypatch.setattr(errors, "distribution", lambda _, text=text: SimpleNamespace(read_text=lambda _: text))
        found[name] = errors.install("serve")
    assert found == {
        "checkout": "pip install -e '.[serve]'",
        "index": "pip install 'fastvlp[serve]'",
        "wheel": "pip install 'fastvlp[serve]'",
    }
