from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from fastvlp.config import differences, show, to_json


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
