"""The description of the package in a registry: its links lead somewhere."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

pytest.importorskip("hatchling", reason="hatchling is not installed: pip install -e '.[dev]'")
hatch_build = pytest.importorskip("hatch_build", reason="installed without its build files")

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def metadata(repository: str) -> dict:
    fields: dict = {}
    hatch_build.PublishedReadme(str(ROOT), {"repository": repository}).update(fields)
    return fields


def targets(text: str) -> list[str]:
    return re.findall(r"\]\(([^)]+)\)", text)


def test_links_are_absolute_where_the_address_is_known():
    address = "https://example.org/me/fastvlp"
    fields = metadata(address + "/")
    text = fields["readme"]["text"]
    assert all(target.startswith("https://") for target in targets(text))
    assert f"![Report of a comparison on the embedded corpus]({address}/raw/HEAD/docs/report.png)" in text
    assert f"[entry 23]({address}/blob/HEAD/docs/log.md#entry-23)" in text
    paths = [target.removeprefix(f"{address}/").split("/", 2)[2] for target in targets(text) if address in target]
    assert paths and all((ROOT / path.partition("#")[0]).exists() for path in paths)
    assert fields["urls"]["Repository"] == address


def test_no_link_is_dead_where_it_is_not():
    fields = metadata("")
    text = fields["readme"]["text"]
    assert all(target.startswith("https://") for target in targets(text)) and targets(text)
    assert "entry 23" in text and "![" not in text and "urls" not in fields
    # All else is as in the repository.
    assert len(text.splitlines()) == len(README.splitlines())


def test_the_address_is_written_in_one_place():
    config = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert isinstance(config["tool"]["hatch"]["metadata"]["hooks"]["custom"]["repository"], str)
    assert {*config["project"]["dynamic"]} == {"readme", "urls"}
