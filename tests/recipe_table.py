"""The table of docs/recipes.md, computed from the recipes. `python -m tests.recipe_table` writes it anew."""

from __future__ import annotations

import importlib
import re
from dataclasses import replace
from inspect import getdoc

import torch

from fastvlp.model.model import VLModel
from fastvlp.recipes import names, recipe
from fastvlp.training.train_config import TrainConfig
from tests.documents import DOCS

PAGE = DOCS / "recipes.md"
HEAD = """\
| recipe | what it trains | parameters | reads | a step, on each GPU | length | result |
| --- | --- | --- | --- | --- | --- | --- |
"""


def recipe_table() -> str:
    return HEAD + "".join(row(name) for name in sorted(names(), key=order))


def order(name: str) -> tuple[int, str]:
    """Small recipes on the embedded corpus first, published sizes last."""
    folder = recipe(name).data.train.partition("/")[0]
    return {"demo": 0, "photos": 1}.get(folder, 2), name


def row(name: str) -> str:
    run, text = recipe(name), getdoc(importlib.import_module(f"fastvlp.recipes.{name}")) or ""
    sentence = re.split(r"\.(?=\s|$)", text, maxsplit=1)[0].replace("\n", " ")
    entries = dict.fromkeys(re.findall(r"docs/log\.md,\s+entry\s+(\d+)", text))
    result = ", ".join(f"[entry {number}](log.md#entry-{number})" for number in entries) or "not measured"
    cells = f"`{name}`", sentence, f"{parameters(run):.1f} M", reads(run), step(run), length(run), result
    return f"| {' | '.join(cells)} |\n"


def parameters(run: TrainConfig) -> float:
    """Millions, with the word embeddings of the recipe's vocabulary."""
    with torch.device("meta"):
        model = VLModel(replace(run.model, text=replace(run.model.text, vocab=run.vocab)))
    return sum(parameter.numel() for parameter in model.parameters()) / 1e6


def reads(run: TrainConfig) -> str:
    folder = run.data.train.removesuffix("/train")
    return f"{'embedded corpus' if folder == 'demo/world' else 'your pairs'}, `{folder}`"


def step(run: TrainConfig) -> str:
    tokens = run.data.max_tokens
    return f"{run.accumulate * (tokens or run.data.batch_size):,} {'tokens' if tokens else 'pairs'}"


def length(run: TrainConfig) -> str:
    return f"{run.steps:,} steps" if run.budget_s is None else f"{run.budget_s / 60:g} min"


def with_table(page: str) -> str:
    """The page with the table of today."""
    start, end = page.index("| recipe |"), page.index("\n\n", page.index("| recipe |")) + 1
    return page[:start] + recipe_table() + page[end:]


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
