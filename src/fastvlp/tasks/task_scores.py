"""The scores of a fine-tuned run: a JSON file beside its weights, and lines to print."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from fastvlp.files import write_whole

# Names of counts among the scores, and names of texts that are printed beside the scores.
NUMBERS, SAID = ("count", "images", "unanswered"), ("not scored", "note")


class TaskScores(NamedTuple):
    """The scores of a run. scores: scores of each split, by name; floats are scores, and other values describe how they were
    computed. path: file with the scores."""

    scores: dict[str, dict[str, Any]]
    path: Path


def save_scores(path: Path, scores: Mapping[str, Any]) -> None:
    write_whole(path, json.dumps(scores, indent=2, ensure_ascii=False).encode())


def new_scores_path(folder: Path) -> Path:
    """Returns the path of results.json, or of results-2.json and so on: an existing result is never overwritten."""
    n = 1
    while (path := folder / ("results.json" if n == 1 else f"results-{n}.json")).exists():
        n += 1
    return path


def format_scores(scores: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns a line for each score, and for each split that could not be scored. A note that applies to several splits is
    printed once."""
    lines: list[str] = []
    notes: set[str] = set()
    for split, values in scores.items():
        for name, value in values.items():
            if isinstance(value, float):
                lines.append(f"{split:>5} {name:24} {value:{'.0f' if name in NUMBERS else '.4f'}}")
            elif name in SAID and not (name == "note" and value in notes):
                lines.append(f"{split:>5} {name}: {value}")
                notes |= {value}
    return "\n".join(lines)
