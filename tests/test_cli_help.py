"""`vlp ... --help` does not wait for torch, and says what it says with torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from fastvlp.cli import COMMANDS, main
from fastvlp.cli_help import asks_for_help_alone
from fastvlp.recipes import names
from fastvlp.tasks.interface import tasks

# The help of a recipe differs from that of another of its family in nothing but numbers.
RECIPES = names() if "FASTVLP_LONG_TESTS" in os.environ else ["flm_demo", "flip_demo", "brivl_demo", "uniter_base"]
HELPS = [
    *(["pretrain", name] for name in RECIPES),
    *(["finetune", task.name] for task in tasks()),
    *(name.split() for name in COMMANDS if name not in ("pretrain", "finetune")),
]
# Modules that take long to import, and that no option needs.
HEAVY = "torch._C", "matplotlib", "sympy", "transformers", "chromadb", "pyarrow"
PRINT_ALL = """
import contextlib, io, json, sys
from fastvlp.cli import main

texts = []
for words in json.loads(sys.stdin.read()):
    sys.argv = ["vlp", *words, "--help"]
    with contextlib.redirect_stdout(io.StringIO()) as text, contextlib.suppress(SystemExit):
        main()
    texts.append(text.getvalue())
print(json.dumps([texts, sorted(sys.modules)]))
"""


def helps(commands: list[list[str]], before: str = "") -> tuple[list[str], list[str]]:
    """The help of each command, printed by one process of its own, and the modules that it imported. `before`: code that it
    runs first."""
    done = subprocess.run(
        [sys.executable, "-c", before + PRINT_ALL],
        input=json.dumps(commands), env={**os.environ, "COLUMNS": "100"}, capture_output=True, text=True, timeout=250,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    texts, modules = json.loads(done.stdout)
    return texts, modules


def test_help_imports_nothing_heavy():
    commands = [["pretrain", "flm_demo"], ["data", "import"], ["finetune", "vqa"]]
    texts, modules = helps(commands)
    for words, text in zip(commands, texts, strict=True):
        assert f"usage: vlp {' '.join(words)}" in text
    assert not {*HEAVY} & {*modules}


def test_the_help_of_a_recipe_says_what_it_is(capsys):
    with pytest.raises(SystemExit):
        main(["pretrain", "flip_photos", "--help"])
    assert "FLIP (arXiv 2212.00794) on your own image-text pairs" in capsys.readouterr().out


@pytest.mark.slow
def test_help_is_the_same_as_with_torch():
    texts, modules = helps(HELPS)
    whole, with_torch = helps(HELPS, "import torch")
    assert "torch._C" not in modules and "torch._C" in with_torch
    assert dict(zip(map(" ".join, HELPS), texts)) == dict(zip(map(" ".join, HELPS), whole))


@pytest.mark.parametrize(
    ("line", "alone"),
    [
        ("pretrain flm_demo --help", True),
        ("serve -h", True),
        ("pretrain mine.py --help", False),
        ("--import mine.py pretrain flm_demo --help", False),
        ("pretrain flm_demo --from runs/x --help", False),
        ("pretrain flm_demo", False),
        ("", False),
    ],
)
def test_torch_is_left_out_only_where_nothing_else_is_asked(line, alone):
    assert asks_for_help_alone(line.split()) == alone
