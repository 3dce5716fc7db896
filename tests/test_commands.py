"""Every `vlp` command in the README, the documentation, the recipes and the Makefile is understood by the command line."""

from __future__ import annotations

import importlib
import re
import resource
import shlex
from inspect import getdoc
from pathlib import Path

import pytest

from fastvlp.cli import keep_freed_memory, main
from fastvlp.recipes import names

ROOT = Path(__file__).parent.parent
COMMAND = re.compile(r"(?:^|&& |\|\| |@|@?\.venv/bin/)(vlp [^#\n]*?)(?= +#|$| &&| \|\|)", re.MULTILINE)


def commands_in(name: str) -> list[str]:
    text = (ROOT / name).read_text(encoding="utf-8").replace("\\\n", " ")
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL) if name.endswith(".md") else [text.replace("\t", "")]
    found = [command for block in blocks for command in COMMAND.findall(block)]
    found += [
        "vlp " + words for block in blocks for words in re.findall(r"-m fastvlp ([^#\n]*?)(?= +#|$)", block, re.M)
    ]
    if name.endswith("coming-from.md"):
        found += re.findall(r"`(vlp [^`]*)`", text)
    return [command.replace("$(BUDGET)", "80") for command in found]


def commands_of_recipe(name: str) -> list[str]:
    text = getdoc(importlib.import_module(f"fastvlp.recipes.{name}")) or ""
    return re.findall(r"^ *(?:torchrun .* --no-python )?(vlp [^#\n]*?)(?= +#|$)", text, re.MULTILINE)


# tests/test_own_parts.py runs the commands of that page, which need its files.
PAGES = [str(page.relative_to(ROOT)) for page in sorted((ROOT / "docs").rglob("*.md")) if page.name != "own-parts.md"]
COMMANDS = [(name, command) for name in ("README.md", "Makefile", *PAGES) for command in commands_in(name)]
COMMANDS += [(f"recipes/{name}.py", command) for name in names() for command in commands_of_recipe(name)]
# Each once, with the place of the first.
DISTINCT = {command: name for name, command in reversed(COMMANDS)}


def test_they_are_found():
    assert {"README.md", "docs/guide/pretrain.md", "Makefile"} <= {name for name, _ in COMMANDS} and len(COMMANDS) > 60


@pytest.mark.parametrize(("command", "name"), DISTINCT.items())
def test_each_is_understood(command, name, monkeypatch):
    runs = []
    monkeypatch.setattr("fastvlp.cli.run", lambda name, ready: runs.append(name))
    # The runs and public models that the commands start from are not there.
    monkeypatch.setattr("fastvlp.training.public_start.with_public_encoders", lambda run, **names: run)
    monkeypatch.setattr("fastvlp.training.starting_point.starting_from", lambda run, folder: run)
    assert main(shlex.split(command)[1:]) == 0 and len(runs) == 1


@pytest.mark.skipif(not keep_freed_memory(), reason="not glibc")
def test_freed_memory_is_used_again():
    """Else the system would clear all pages of each large tensor anew."""
    faults = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        block = b"x" * (64 << 20)
        del block
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    assert max(faults[1:]) < (64 << 20) // resource.getpagesize() / 10
