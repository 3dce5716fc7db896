"""What evaluations leave beside a run: one file for each task and data set, to which every further evaluation is added."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from itertools import count
from pathlib import Path
from typing import Any

from rich.table import Table

from fastvlp.errors import UserError
from fastvlp.files import write_whole


def keep_result(run: str | Path, task: str, data: str, result: Mapping[str, Any]) -> Path:
    """Appends to `evaluations/TASK-DATA.json` in the run's folder. `data`: folder of the shards; those with the same two
    last names are told apart by a number. Raises UserError where an earlier file is damaged."""
    where = data if "://" in data else str(Path(data).resolve())
    name = re.sub(r"[^\w.-]+", "-", "-".join(where.rstrip("/").split("/")[-2:])).strip("-")
    for n in count(1):
        path = Path(run) / "evaluations" / f"{task}-{name}{f'-{n}' if n > 1 else ''}.json"
        told: dict[str, Any] = _told(path) if path.exists() else {"task": task, "data": where, "results": []}
        if told["data"] == where:
            break
    told["results"].append(dict(result))
    write_whole(path, json.dumps(told, indent=2, ensure_ascii=False).encode())
    return path


def _told(path: Path) -> dict[str, Any]:
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        return {"task": told["task"], "data": told["data"], "results": list(told["results"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: not the results of an evaluation ({error!r}); move it away and start again"
        ) from error


def score_table(columns: Mapping[str, Mapping[str, float]]) -> Table:
    """A row for each score, a column for each way that it was got; shares as per cent."""
    table = Table("", *columns, show_edge=False)
    for name in dict.fromkeys(name for scores in columns.values() for name in scores):
        table.add_row(name, *(_shown(name, scores[name]) if name in scores else "-" for scores in columns.values()))
    return table


def _shown(name: str, value: float) -> str:
    return f"{value:.1f}" if name.endswith("rank") else f"{100 * value:.2f} %"
