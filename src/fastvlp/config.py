"""Frozen dataclasses as JSON: to save a resolved run, read it again, print it and compare it; and the ranges of their numbers.
The command line is tyro's."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_type_hints

import cattrs
from cattrs.errors import BaseValidationError

from fastvlp.errors import UserError

T = TypeVar("T")
Json = None | bool | int | float | str | list["Json"] | dict[str, "Json"]
# Larger integers are no numbers of JSON elsewhere, and no sizes of anything.
MOST = 1 << 53


@dataclass(frozen=True)
class Range:
    """The allowed range of a number in a config, as part of its type: `lr: Annotated[float, Range(above=0)]`."""

    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None

    def holds(self, value: float) -> bool:
        return (
            (self.least is None or value >= self.least)
            and (self.above is None or value > self.above)
            and (self.most is None or value <= self.most)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        limits = {"at least": self.least, "above": self.above, "at most": self.most, "below": self.below}
        return " and ".join(f"{words} {limit:g}" for words, limit in limits.items() if limit is not None)


Count = Annotated[int, Range(least=1)]
Positive = Annotated[float, Range(above=0)]
NotNegative = Annotated[float, Range(least=0)]
Share = Annotated[float, Range(least=0, most=1)]
PositiveShare = Annotated[float, Range(above=0, most=1)]
ShareBelowOne = Annotated[float, Range(least=0, below=1)]


def check_numbers(config: Any, path: str = "") -> None:
    """Raises UserError if a number in a dataclass, or in those within it, is NaN, infinite, or out of the range in its type.
    `path`: what the dataclass is called, such as optim."""
    if wrong := [*_number_faults(config, None, path)]:
        raise UserError("; ".join(wrong))


def _number_faults(value: Any, kind: Any, name: str) -> Iterator[str]:
    if is_dataclass(value) and not isinstance(value, type):
        kinds = _kinds(type(value))
        for f in fields(value):
            yield from _number_faults(getattr(value, f.name), kinds.get(f.name), f"{name}.{f.name}" if name else f.name)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            # The options of a mapping of numbers are one option; those of a mapping of dataclasses have dotted names.
            yield from _number_faults(item, kind, f"{name}.{key}" if is_dataclass(item) else name)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _number_faults(item, kind, name)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        if not math.isfinite(value) if isinstance(value, float) else abs(value) > MOST:
            yield f"`{name}` must be a {'finite' if isinstance(value, float) else 'smaller'} number, not {value:g}"
        elif (allowed := _range(kind)) is not None and not allowed.holds(value):
            yield f"`{name}` must be {allowed}, not {value:g}"


@lru_cache
def _kinds(cls: type) -> dict[str, Any]:
    try:
        return get_type_hints(cls, include_extras=True)
    except NameError:
        return {}  # a class of the user's own, with a type that is imported for type checkers alone


def _range(kind: Any) -> Range | None:
    """The range in a type, which may be optional, or of the members of a tuple."""
    if isinstance(kind, Range):
        return kind
    parts = (*get_args(kind), *getattr(kind, "__metadata__", ()))
    return next(filter(None, map(_range, parts)), None)


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


def from_json(cls: type[T], value: Any, source: str, converter: cattrs.Converter = cattrs.global_converter) -> T:
    """The dataclass that `to_json` wrote; fields that it no longer has are left out. Raises UserError, naming `source`, where
    a field is missing or of another type. `converter`: knows further types."""
    try:
        return converter.structure(value, cls)
    except (BaseValidationError, KeyError, TypeError, ValueError, UserError) as error:
        reasons = "; ".join(cattrs.transform_error(error)) if not isinstance(error, UserError) else str(error)
        raise UserError(f"{source}: not a {cls.__name__} that this version knows ({reasons}); copy it again") from error


def with_defaults(saved: Json, value: Any) -> Json:
    """Returns a value that `to_json` wrote, completed by the defaults of newer fields. `value`: a config that has these
    fields."""
    if not isinstance(saved, dict):
        return saved
    if isinstance(value, Mapping):
        return {name: with_defaults(part, value.get(name)) for name, part in saved.items()}
    if not is_dataclass(value) or isinstance(value, type) or saved.get("type") != type(value).__name__:
        return saved
    filled = {name: with_defaults(part, getattr(value, name, None)) for name, part in saved.items()}
    for f in fields(value):
        if f.name not in saved and f.default is not MISSING:
            filled[f.name] = to_json(f.default)
        elif f.name not in saved and f.default_factory is not MISSING:
            filled[f.name] = to_json(f.default_factory())
    return filled


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
