"""Frozen dataclasses as JSON: to save a resolved run, read it again, print it and compare it. The command line is tyro's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

import cattrs
from cattrs.errors import BaseValidationError

from fastvlp.errors import UserError

T = TypeVar("T")
Json = None | bool | int | float | str | list["Json"] | dict[str, "Json"]


def to_json(value: Any) -> Json:
    """Converts a config to JSON. A dataclass becomes an object with its class's name under `type`."""
    if is_dataclass(value) and not isinstance(value, type):
        named: dict[str, Json] = {"type": type(value).__name__}
        return named | {f.name: to_json(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"a config holds numbers, strings, lists and dataclasses, not {type(value).__name__}")


def from_json(cls: type[T], value: Any, source: str) -> T:
    """The dataclass that `to_json` wrote; fields that it no longer has are left out. Raises UserError, naming `source`, where
    a field is missing or of another type."""
    try:
        return cattrs.structure(value, cls)
    except (BaseValidationError, KeyError, TypeError, ValueError, UserError) as error:
        reasons = "; ".join(cattrs.transform_error(error)) if not isinstance(error, UserError) else str(error)
        raise UserError(f"{source}: not a {cls.__name__} that this version knows ({reasons}); copy it again") from error


def flatten(value: Json, path: str = "") -> dict[str, Json]:
    """{"optim": {"lr": 1}} -> {"optim.lr": 1}: the names that the command line uses."""
    if not isinstance(value, dict):
        return {path: value}
    items = [flatten(item, f"{path}.{key}" if path else key) for key, item in value.items()]
    return {key: item for part in items for key, item in part.items()}


def differences(old: Json, new: Json) -> dict[str, tuple[Json, Json]]:
    """Fields by dotted name whose values differ, each (old, new); a missing one counts as None."""
    left, right = flatten(old), flatten(new)
    names = sorted({*left, *right})
    return {name: (left.get(name), right.get(name)) for name in names if left.get(name) != right.get(name)}


def show(value: Any) -> str:
    """Formats a config for people: a line for each field, and one for each dataclass that holds no other."""
    lines: list[str] = []

    def walk(item: dict[str, Json], depth: int) -> None:
        for name, inner in item.items():
            if name == "type":
                continue
            indent = "  " * depth
            if not isinstance(inner, dict):
                lines.append(f"{indent}{name}: {inner}")
            # A mapping of plain values, such as the rates of parts, is a value itself.
            elif any(isinstance(part, dict) and "type" in part for part in inner.values()):
                lines.append(f"{indent}{name}: {inner.get('type', '')}".rstrip())
                walk(inner, depth + 1)
            else:
                values = ", ".join(f"{key}={part}" for key, part in inner.items() if key != "type")
                lines.append(f"{indent}{name}: {inner.get('type', '')}({values})")

    config = to_json(value)
    if isinstance(config, dict):
        walk(config, 0)
    return "\n".join(lines)
