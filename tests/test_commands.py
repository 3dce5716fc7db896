"""Every `vlp` command that the README, the guide and the Makefile tell is one that the command line understands."""

from __future__ import annotations

import re
import resource
import shlex
from pathlib import Path

import pytest

from fastvlp.cli import keep_freed_memory, main

ROOT = Path(__file__).parent.parent
COMMAND = re.compile(r"(?:^|&& |\|\| |@|@?\.venv/bin/)(vlp [^#\n]*?)(?= +#|$| &&| \|\|)", re.MULTILINE)


def told(name: str) -> list[str]:
    text = (ROOT / name).read_text(encoding="utf-8").replace("\\\n", " ")
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL) if name.endswith(".md") else [text.replace("\t", "")]
    found = [command for block in blocks for command in COMMAND.findall(block)]
    return [command.replace("$(BUDGET)", "80") for command in found]


COMMANDS = [(name, command) for name in ("README.md", "docs/guide.md", "Makefile") for command in told(name)]


def test_they_are_found():
    assert {name for name, _ in COMMANDS} == {"README.md", "docs/guide.md", "Makefile"} and len(COMMANDS) > 60


@pytest.mark.parametrize(("name", "command"), COMMANDS)
def test_each_is_understood(name, command, monkeypatch):
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
