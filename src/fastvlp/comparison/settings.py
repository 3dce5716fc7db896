"""`--set FIELD=VALUE`: changes to the configs of several recipes at once, parsed as the options of `vlp pretrain`."""

from __future__ import annotations

import contextlib
import difflib
import io
import math
import re
from collections.abc import Collection, Sequence
from dataclasses import replace

import tyro

from fastvlp.config import flatten, to_json
from fastvlp.errors import UserError
from fastvlp.model.named_sizes import named_size
from fastvlp.training.train_config import TrainConfig

# How the values that are written in lower case elsewhere are written for tyro.
WORDS = {"none": "None", "true": "True", "false": "False"}


def with_settings(run: TrainConfig, settings: Sequence[str], arm: str) -> TrainConfig:
    """The config after each `FIELD=VALUE` of `settings`, such as optim.lr=3e-4; `ARM:FIELD=VALUE` is for one arm alone.

    The values of a tuple are separated by commas: optim.betas=0.9,0.98. `model=tiny` takes a size by its name, before fields of
    the model are set. Raises UserError for a field that there is not, with the nearest ones, and for a value that the field
    does not take.
    """
    for setting in sorted(settings, key=lambda setting: split_setting(setting)[1] != "model"):
        owner, field, value = split_setting(setting)
        if owner in (None, arm):
            run = _set(run, field, value, setting)
    return run


def check_arms(settings: Sequence[str], arms: Collection[str]) -> None:
    """Raises UserError for a setting of an arm that there is not."""
    for setting in settings:
        owner = split_setting(setting)[0]
        if owner is not None and owner not in arms:
            raise UserError(f"`set` {setting}: no recipe here is called {owner}; there are {', '.join(arms)}")


def split_setting(setting: str) -> tuple[str | None, str, str]:
    """(arm, or None for all; field; value)"""
    path, equals, value = setting.partition("=")
    if not equals:
        raise UserError(f"`set` {setting}: write FIELD=VALUE, such as optim.lr=3e-4")
    owner, colon, field = path.rpartition(":")
    return owner if colon else None, field, value


def budget_of(text: str) -> tuple[float, bool]:
    """The seconds of `120s`, `20m` or `1.5h`, or the steps of `800steps`; and whether they are steps."""
    number, steps, rest = text.partition("steps")
    return (duration(number), True) if steps and not rest and number[-1:].isdigit() else (duration(text), False)


def duration(text: str) -> float:
    """Seconds of `120`, `120s`, `20m` or `1.5h`."""
    units = {"s": 1.0, "m": 60.0, "h": 3600.0}
    number, unit = (text[:-1], text[-1]) if text[-1:] in units else (text, "s")
    try:
        seconds = float(number) * units[unit]
    except ValueError:
        seconds = math.nan
    if not math.isfinite(seconds):
        raise UserError(f"{text!r} is no duration; write 120s, 20m or 1.5h, or as a budget also 800steps")
    return seconds


def _set(run: TrainConfig, field: str, value: str, setting: str) -> TrainConfig:
    if field == "model":
        try:
            return replace(run, model=named_size(value, like=run.model))
        except UserError as error:
            raise UserError(f"`set` {setting}: {error}") from error
    _check_field(run, field.replace("-", "_"), setting)
    value = WORDS.get(value.lower(), value)
    # A comma separates the values of a tuple, but it may also be part of a text.
    attempts = [value.strip("()[] ").split(",")] if "," in value else []
    attempts.append([value])
    errors = []
    for values in attempts:
        words = [f"--{field}={value}"] if len(values) == 1 else [f"--{field}", *(one.strip() for one in values)]
        output = io.StringIO()
        try:
            with contextlib.redirect_stderr(output), contextlib.redirect_stdout(output):
                return tyro.cli(
                    TrainConfig,
                    default=run,
                    args=words,
                    prog="",
                    config=(tyro.conf.AvoidSubcommands, tyro.conf.FlagConversionOff),
                )
        except SystemExit:
            errors.append(_reason(output.getvalue()))
        except UserError as error:
            raise UserError(f"`set` {setting}: {error}") from error
    raise UserError(f"`set` {setting}: {errors[0]}")


def _check_field(run: TrainConfig, field: str, setting: str) -> None:
    names = [name for name in flatten(to_json(run)) if name.rpartition(".")[2] != "type"]
    if field in names:
        return
    if inner := [name for name in names if name.startswith(f"{field}.")]:
        raise UserError(f"`set` {setting}: {field} has fields; set one of them, such as {inner[0]}")
    near = difflib.get_close_matches(field, names, 3, 0.5) or names
    raise UserError(f"`set` {setting}: the recipe has no field {field}; the nearest are {', '.join(near)}")


def _reason(output: str) -> str:
    """The first paragraph of what tyro prints about an error, below its title."""
    parts = re.split(r"^[^\w\n]*[-─]{5,}[^\w\n]*$", output, flags=re.MULTILINE)
    text = re.sub(r"[│╭╮╰╯]", " ", parts[1] if len(parts) > 1 else output)
    return " ".join(text.strip().split("\n\n")[0].split()).rstrip(".")
