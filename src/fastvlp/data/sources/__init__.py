"""The formats that can be imported; each is one file (see `interface`). This file finds the format of a path."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import MISSING, fields
from difflib import get_close_matches
from glob import glob
from pathlib import Path
from typing import Any, get_type_hints

from fastvlp.data.sources.interface import Match, Source
from fastvlp.data.sources.source_files import IMAGE_SUFFIXES
from fastvlp.errors import UserError
from fastvlp.extensions import variants


def formats() -> dict[str, type[Source]]:
    """Returns all formats by name: those of this package, and those in files that the user imported. Raises UserError if two
    have the same name."""
    sources = sorted(variants(Source, __name__), key=lambda source: source.name)
    names = [source.name for source in sources]
    if double := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"several formats are called {', '.join(double)}; give your own another name")
    return dict(zip(names, sources))


def formats_help() -> str:
    """Returns a line for each format, with its own options below."""
    lines = []
    for name, source in formats().items():
        lines.append(f"  {name:14}{source.summary}")
        if options := [f"`{field.name}`" for field in fields(source)]:
            lines.append(f"{'':16}with {', '.join(options)}")
    return "\n".join(lines)


def find_format(path: Path, format: str = "auto") -> type[Source]:
    """Returns the format of that name; or for `auto` the format that is most certain of `path`.

    Raises UserError if there is no such path or format, or if the path looks like no format or like several.
    """
    known = formats()
    if format != "auto" and format not in known:
        near = get_close_matches(format, known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}."
        raise UserError(
            f"`format` {format}: no such format; {hint} One of your own is in a file that is imported first, with "
            f"`vlp --import FILE.py ...` or `fastvlp.import_file`"
        )
    path = matching_paths(path)[0]
    if format != "auto":
        return known[format]
    surest, sources = _surest(path)
    inner = _readable_files(path) if surest in (Match.NONE, Match.CONTENTS) and path.is_dir() else []
    if surest is Match.NONE and not inner:
        raise UserError(
            f"{path}: not recognised; name its `format`, and if it is one of your own, import its file first, with "
            f"`vlp --import FILE.py ...` or `fastvlp.import_file`. The known formats:\n{formats_help()}"
        )
    if inner:
        looks = f"looks like {sources[0].name}, but " if surest is Match.CONTENTS else ""
        other = f", or the `format` {sources[0].name}" if looks else ""
        raise UserError(f"{path}: {looks}holds {_names(inner)}; {_how_to_give(inner)}{other}")
    if len(sources) > 1:
        names = " and of ".join(source.name for source in sources)
        raise UserError(f"{path}: holds files of {names}; name the `format` to read")
    return sources[0]


def matching_paths(path: Path) -> list[Path]:
    """Returns the path; or for a pattern such as `data/train-*.parquet`, all paths that match it, sorted by name. Raises
    UserError if there is none."""
    if path.exists():
        return [path]
    if paths := [Path(name) for name in sorted(glob(str(path), recursive=True))]:  # noqa: PTH207 (of any path)
        return paths
    if re.match(r"[a-z0-9]+:/", str(path)):
        raise UserError(f"{path}: this is a URL, but a path is needed; download it first")
    raise UserError(f"{path}: no such file or folder")


def option_types(*sources: type[Source]) -> dict[str, Any]:
    """Returns the options of these formats, with their types."""
    return {field.name: get_type_hints(source)[field.name] for source in sources for field in fields(source)}


def check_options(source: type[Source], names: Iterable[str]) -> None:
    """Raises UserError for an option that the format does not have."""
    own = [field.name for field in fields(source)]
    for name in names:
        if name not in own:
            has = f"it has {', '.join(f'`{option}`' for option in own)}" if own else "it has none"
            raise UserError(f"`{name}` is no option of the format {source.name}; {has}")


def make_source(source: type[Source], options: dict[str, Any]) -> Source:
    """Returns a format with its own options. Raises UserError for an option that it does not have, or that is missing."""
    check_options(source, options)
    for field in fields(source):
        if field.name not in options and field.default is MISSING and field.default_factory is MISSING:
            raise UserError(f"the format {source.name} needs `{field.name}`")
    return source(**options)


def _surest(path: Path) -> tuple[Match, list[type[Source]]]:
    """Returns the highest certainty with which any format matches the path, and the formats that have this certainty."""
    matches = {source: source.match(path) for source in formats().values()}
    surest = max(matches.values())
    return surest, [source for source, match in matches.items() if match is surest]


def _readable_files(folder: Path) -> list[Path]:
    """Returns the files directly in a folder that have a format themselves, such as tables among images: all files of the first
    file extension of which one has a format."""
    by_suffix: dict[str, list[Path]] = {}
    for file in sorted(folder.iterdir()):
        if file.is_file():
            by_suffix.setdefault(file.suffix.lower(), []).append(file)
    for files in sorted(by_suffix.values()):
        if readable := [
            file for file in files if file.suffix not in IMAGE_SUFFIXES and _surest(file)[0] is not Match.NONE
        ]:
            return readable
    return []


def _names(files: list[Path]) -> str:
    names = [file.name for file in files]
    return " and ".join(names) if len(names) < 3 else f"{', '.join(names[:2])} and {len(names) - 2} more such files"


def _how_to_give(files: list[Path]) -> str:
    first = files[0]
    if len(files) == 1:
        return f"give the path {first} to import that"
    suffixes = {file.suffix for file in files}
    pattern = first.with_name(f"*{suffixes.pop()}" if len(suffixes) == 1 else "*")
    return f"give one of their paths, such as {first}, or all by the pattern '{pattern}' (in quotes)"
