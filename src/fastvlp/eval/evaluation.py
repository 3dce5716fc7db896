"""The result of an evaluation, and the file in the run's folder to which it is added."""

from __future__ import annotations

import functools
import importlib
import inspect
import json
import pkgutil
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from difflib import get_close_matches
from itertools import count
from pathlib import Path
from typing import Any, ParamSpec

from rich.table import Table

from fastvlp.config import to_json
from fastvlp.dist import pick_device
from fastvlp.errors import UserError
from fastvlp.files import read_plain, write_whole
from fastvlp.plain_json import parse_json
from fastvlp.provenance import about

P = ParamSpec("P")


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The result of an evaluation.

    Attributes:
        scores: by method (`towers`, `reranked`), then by metric; shares are in 0..1.
        counts: images, texts, classes, ...
        data: folder of the shards that were scored.
        weights: name of the weights' file.
        step: training step of the weights.
        chance: what a random order would score, by metric, where that is known.
        errors: standard errors of the scores, where there are any.
        seconds: time of each part, where it was measured.
        details: what else a reader of the numbers needs, by name.
        path: file to which the result was added.
    """

    scores: Mapping[str, Mapping[str, float]]
    counts: Mapping[str, int]
    data: str
    weights: str
    step: int | None
    chance: Mapping[str, float] = field(default_factory=dict)
    errors: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)
    path: Path | None = None


def evaluation(measure: Callable[P, Evaluation]) -> Callable[P, Evaluation]:
    """Makes an evaluation of a function `evaluate_NAME(run, /, *, data, ..., encoding)`: its result is also added to
    `evaluations/NAME-DATA.json` in the run's folder, with the options and the machine."""
    name = measure.__name__.removeprefix("evaluate_")

    @functools.wraps(measure)
    def measure_and_save(*args: P.args, **options: P.kwargs) -> Evaluation:
        result = measure(*args, **options)
        bound = inspect.signature(measure).bind(*args, **options)
        bound.apply_defaults()
        arguments = bound.arguments
        content = {key: value for key, value in asdict(result).items() if key not in ("path", "details")}
        content |= {"settings": flat_options(arguments), "about": about(pick_device(arguments["encoding"].device))}
        path = add_result(arguments["run"], name, result.data, content | dict(result.details))
        result = replace(result, path=path)
        if arguments.get("above_chance"):
            check_above_chance(result)
        return result

    return measure_and_save


def check_above_chance(result: Evaluation) -> None:
    """Raises UserError if a method's recall is not clearly above chance: twice as high, and by five standard errors."""
    chance = result.chance["recall"]
    for method, scores in result.scores.items():
        if scores["recall"] < max(2 * chance, chance + 5 * result.errors[method]["recall"]):
            raise UserError(
                f"recall is {scores['recall']:.2%} and chance {chance:.2%}: the model has not learned to retrieve yet; train "
                f"it for more steps, or at another learning rate (scores: {result.path})"
            )


def evaluations() -> dict[str, Callable[..., Evaluation]]:
    """Returns all evaluations of this package by name: the functions called `evaluate_NAME` in its modules."""
    package = importlib.import_module(__package__ or "")
    modules = [importlib.import_module(f"{package.__name__}.{m.name}") for m in pkgutil.iter_modules(package.__path__)]
    return {
        name.removeprefix("evaluate_"): function
        for module in modules
        for name, function in inspect.getmembers(module, inspect.isfunction)
        if name.startswith("evaluate_") and function.__module__ == module.__name__ != __name__
    }


def evaluate_embeddings(name: str, run: str | Path, /, **options: Any) -> Evaluation:
    """Runs the evaluation of this name (`retrieval`, `zeroshot`, `probe`, `sugarcrepe`, ...).

    `options` are its keyword arguments; the fields of `encoding`, such as `batch_size` or `device`, may stand beside them.
    Raises UserError for a name or an option that there is not.
    """
    known = evaluations()
    if name not in known:
        raise UserError(f"no evaluation is called {name}; choose from {', '.join(known)}")
    parameters = inspect.signature(known[name]).parameters
    encoding = options.pop("encoding", parameters["encoding"].default)
    of_encoding = {field.name for field in fields(encoding)}
    if unknown := [option for option in options if option not in {*parameters, *of_encoding}]:
        near = get_close_matches(unknown[0], [*parameters, *of_encoding], 3) or sorted({*parameters, *of_encoding})
        raise UserError(f"the evaluation {name} has no option {unknown[0]}; the nearest are {', '.join(near)}")
    encoding = replace(encoding, **{option: options.pop(option) for option in list(options) if option in of_encoding})
    return known[name](run, encoding=encoding, **options)


def flat_options(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a function as JSON; the fields of a dataclass stand beside the other arguments."""
    flat: dict[str, Any] = {}
    for name, value in arguments.items():
        if is_dataclass(value) and not isinstance(value, type):
            flat |= flat_options({key: getattr(value, key) for key in value.__dataclass_fields__})
        else:
            flat[name] = to_json(value)
    return flat


def add_result(run: str | Path, task: str, data: str, result: Mapping[str, Any]) -> Path:
    """Adds a result to `evaluations/TASK-DATA.json` in the run's folder, after those of earlier evaluations.

    `data` is the folder of the shards. Another folder with the same two last names gets a file of its own, with a number.
    Raises UserError if an earlier file is damaged.
    """
    place = data if "://" in data else str(Path(data).resolve())
    name = re.sub(r"[^\w.-]+", "-", "-".join(place.rstrip("/").split("/")[-2:])).strip("-")
    for n in count(1):
        path = Path(run) / "evaluations" / f"{task}-{name}{f'-{n}' if n > 1 else ''}.json"
        content: dict[str, Any] = {"task": task, "data": place, "results": []}
        if path.exists():
            content = _read_results(path)
        if content["data"] == place:
            break
    content["results"].append(dict(result))
    write_whole(path, json.dumps(content, indent=2, ensure_ascii=False).encode())
    return path


def _read_results(path: Path) -> dict[str, Any]:
    try:
        content = parse_json(read_plain(path))
        return {"task": content["task"], "data": content["data"], "results": list(content["results"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: not a file of evaluation results ({error!r}); move it away and evaluate again"
        ) from error


def score_table(result: Evaluation) -> Table:
    """A table to print: a row for each metric, a column for each method, with standard errors, and one for chance. Shares are
    shown as per cent."""
    columns = {**result.scores, **({"chance": result.chance} if result.chance else {})}
    table = Table("", *columns, show_edge=False)
    for name in dict.fromkeys(name for scores in columns.values() for name in scores):
        errors = [result.errors.get(column, {}).get(name) for column in columns]
        cells = [
            _format_score(name, scores[name], error) if name in scores else "-"
            for scores, error in zip(columns.values(), errors)
        ]
        table.add_row(name, *cells)
    return table


def _format_score(name: str, value: float, error: float | None) -> str:
    times, digits, unit = (1, 1, "") if name.endswith("rank") else (100, 2, " %")
    spread = "" if error is None else f" ± {times * error:.{digits}f}"
    return f"{times * value:.{digits}f}{spread}{unit}"
