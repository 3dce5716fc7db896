"""`--set optim.lr=3e-4` for several recipes at once: dotted names into nested frozen dataclasses and mappings."""

from __future__ import annotations

import difflib
import json
import types
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from fastvlp.errors import UserError

T = TypeVar("T")


def override(config: T, settings: Sequence[str], name: str) -> T:
    """`config` with each `FIELD=VALUE` of `settings`; `ARM:FIELD=VALUE` is for the arm called `name` alone.

    Raises UserError for an unknown field (naming the nearest), for a value of another type, and for what a config refuses.
    """
    for setting in settings:
        path, equals, value = setting.partition("=")
        if not equals:
            raise UserError(f"--set {setting}: write FIELD=VALUE, such as optim.lr=3e-4")
        arm, colon, rest = path.rpartition(":")
        if not colon or arm == name:
            config = _set(config, rest.split("."), value, setting)
    return config


def duration(text: str) -> float:
    """Seconds of `120`, `120s`, `20m` or `1.5h`."""
    units = {"s": 1.0, "m": 60.0, "h": 3600.0}
    number, unit = (text[:-1], text[-1]) if text[-1:] in units else (text, "s")
    try:
        return float(number) * units[unit]
    except ValueError:
        raise UserError(f"{text!r} is no duration; write 120s, 20m or 1.5h") from None


def _set(config: Any, path: list[str], value: str, setting: str) -> Any:
    name, rest = path[0], path[1:]
    told = bool(is_dataclass(config))
    hints = get_type_hints(type(config)) if told else {}
    names = [f.name for f in fields(config)] if told else list(config)
    if name not in names:
        near = difflib.get_close_matches(name, names, 3, 0.5) or sorted(names)
        raise UserError(f"--set {setting}: {type(config).__name__} has no {name!r}; nearest: {', '.join(near)}")
    inner = getattr(config, name) if told else config[name]
    nested = is_dataclass(inner) or isinstance(inner, Mapping)
    if bool(rest) != nested:
        what = "choose one of its fields" if nested else "it has no fields"
        raise UserError(f"--set {setting}: {name} is {type(inner).__name__}; {what}")
    new = _set(inner, rest, value, setting) if rest else parse(value, hints.get(name, type(inner)), setting)
    try:
        return replace(config, **{name: new}) if told else {**config, name: new}
    except ValueError as error:
        raise UserError(f"--set {setting}: {error}") from error


def parse(text: str, hint: Any, setting: str) -> Any:
    """`text` as a value of the type `hint`: numbers, strings, bool, None, Literal, unions and tuples of them."""
    for choice in _choices(hint):
        found, value = _as(text, choice, setting)
        if found:
            return value
    wanted = getattr(hint, "__name__", None) if isinstance(hint, type) else str(hint).replace("typing.", "")
    raise UserError(f"--set {setting}: {text!r} is not of type {wanted}")


def _choices(hint: Any) -> list[Any]:
    """The members of a union; str last, since any text is one."""
    members = list(get_args(hint)) if get_origin(hint) in (Union, types.UnionType) else [hint]
    return sorted(members, key=lambda member: member is str)


def _as(text: str, hint: Any, setting: str) -> tuple[bool, Any]:
    """(whether it is one, the value)"""
    if hint is type(None):
        return text.lower() == "none", None
    if hint is bool:
        return text.lower() in ("true", "false"), text.lower() == "true"
    if get_origin(hint) is Literal:
        return text in get_args(hint), text
    if get_origin(hint) is tuple:
        parts, kinds = text.strip("()[] ").split(","), get_args(hint)
        kinds = kinds[:1] * len(parts) if kinds[-1] is Ellipsis else kinds
        if len(parts) != len(kinds):
            return False, None
        return True, tuple(parse(part.strip(), kind, setting) for part, kind in zip(parts, kinds))
    if hint in (int, float, str):
        try:
            return True, hint(text)
        except ValueError:
            return False, None
    try:
        value = json.loads(text)
    except ValueError:
        return False, None
    return isinstance(hint, type) and isinstance(value, hint), value
