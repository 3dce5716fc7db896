"""Reading csv, tsv and their like: the separator and whether there is a header are found by looking at the first two lines,
and a line that cannot be read is dropped alone."""

from __future__ import annotations

import csv
import re
from collections.abc import Collection, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

from fastvlp.batch import Dropped
from fastvlp.data.sources.source_files import IMAGE_SUFFIXES, is_url
from fastvlp.errors import UserError

Header = Literal["auto", "yes", "no"]
CELL_LIMIT = 1 << 24  # csv's own limit of 128 KiB a cell is below the longest captions
LOOKED_AT = 10_000  # characters of a line in which a separator is looked for
SEPARATORS = (",", "\t", ";", "|")
# A quoted cell may span lines; an opening quote without a closing one is a character like any other.
LINES_OF_A_CELL = 100
# `1.jpg#0`, as Flickr8k and Flickr30k number the captions of an image.
_NOT_UTF8 = re.compile("[\udc80-\udcff]")
_NUMBERED = re.compile(r"#\w*$")
# Of a cell that is no name of a column: a path, damaged bytes, or a sentence.
_NO_NAME = re.compile(r"[/\\]|\.\w|[\x00-\x1f\ufffd\udc80-\udcff]|\S+\s+\S+\s+\S+\s+\S+")


class Row(NamedTuple):
    """The cells of a row by column, and where it is, as `pairs.csv:7`."""

    place: str
    cells: dict[str, Any]


def read_delimited(path: Path, separator: str, header: Header, usual: Collection[str]) -> Iterator[Row | Dropped]:
    """Yields the rows; a line that is none is Dropped, called by file and line.

    Args:
        separator: between cells; empty to find it.
        header: whether the first line names the columns; `auto`: where it holds one of the `usual` names, or nothing that
            looks like the path of an image.
    """
    lines = _text(path).split("\n")
    top = [line[:LOOKED_AT] for line in islice((line for line in lines if line.strip()), 2)]
    if not top:
        return
    separator = separator or find_separator(path, top, usual)
    records = _records(path.name, [line.removesuffix("\r") for line in lines], separator)
    place, first = next(records)
    following = [*islice(records, 1)]
    if header != "yes" and following and _is_damaged(first, following[0][1], usual):
        yield Dropped(key=place, reason="the first line names neither columns nor an image")
        (place, first), following = following[0], []
    data: Iterator[tuple[str, list[str]]] = chain(following, records)
    second = following[0][1] if following else []
    if header == "yes" or (header == "auto" and _is_header(first, second, usual)):
        columns = _distinct([name.strip() or f"column {n}" for n, name in enumerate(first, 1)])
    else:
        columns = _invented_columns(first if any(map(looks_like_image, first)) or not following else second)
        data = chain([(place, first)], data)
    padded = separator == "|" or (len(first) > 1 and all(name.startswith(" ") for name in first[1:]))
    for place, cells in data:
        while len(cells) > len(columns) and not cells[-1].strip():
            cells.pop()
        if len(cells) > len(columns):
            yield Dropped(key=place, reason="more cells than columns; quote a cell that holds a separator")
        elif any(map(_NOT_UTF8.search, cells)):
            yield Dropped(key=place, reason="line is not UTF-8; convert the file with `iconv -f ITS_ENCODING -t UTF-8`")
        else:
            row = dict(zip(columns, (cell.strip() for cell in cells) if padded else cells))
            yield Row(place, dict.fromkeys(columns) | row)


def find_separator(path: Path, top: Sequence[str], usual: Collection[str]) -> str:
    """The separator of a table by its first two lines: the one that makes most usual names of the first, or else a path of an
    image and another cell of the first or the second; or else the one that the file's ending says."""
    default = "\t" if path.suffix.lower() in (".tsv", ".token") or path.name.lower().endswith(".token.txt") else ","

    def score(separator: str) -> tuple[int, list[int], bool]:
        rows = [next(csv.reader([line], delimiter=separator), []) for line in top]
        rows = [cells if len(cells) > 1 else [] for cells in rows]
        names = sum(plain_name(cell) in usual for cell in rows[0])
        return names, [sum(map(looks_like_image, cells)) for cells in rows], separator == default

    return max(SEPARATORS, key=score)


def looks_like_image(cell: str) -> bool:
    """Whether a cell is the path or URL of an image."""
    name = _NUMBERED.sub("", cell.strip())
    return is_url(name) or any(name.lower().endswith(suffix) for suffix in IMAGE_SUFFIXES)


def image_name(cell: str) -> str:
    """The path of an image in a cell, without the number of its caption (`1.jpg#0`)."""
    name = cell.strip()
    return _NUMBERED.sub("", name) if "#" in name and looks_like_image(name) else name


def plain_name(column: str) -> str:
    """A column's name as it is compared with usual names."""
    return column.strip().lower().replace(" ", "_").replace("-", "_")


def _is_header(first: Sequence[str], second: Sequence[str], usual: Collection[str]) -> bool:
    if any(plain_name(cell) in usual for cell in first):
        return True
    # Flickr8k's and Flickr30k's files, which number the captions of an image, have none.
    numbered = any(image_name(cell) != cell.strip() for cell in second)
    return not numbered and not any(map(looks_like_image, first))


def _is_damaged(first: Sequence[str], second: Sequence[str], usual: Collection[str]) -> bool:
    """Whether the first line is neither a header nor like the second, which names an image: the columns are those of the
    second then, or every line would be dropped because of one. A header of other names is taken for such a line where it has
    two columns, of which no name is needed; where it has more, only if a cell cannot be a name."""
    if not any(map(looks_like_image, second)) or any(plain_name(cell) in usual for cell in first):
        return False
    if len(first) == 1:
        return len(second) > 1
    if any(map(looks_like_image, first)):
        return False
    no_names = any(not cell.strip() or _NO_NAME.search(cell) for cell in first)
    return len(first) == len(second) and (len(first) == 2 or no_names) and "caption" in _invented_columns(second)


def _invented_columns(first: Sequence[str]) -> list[str]:
    """Names for the columns of a table without header: `image`, and `caption` for the only other column of texts."""
    columns = [f"column {n}" for n in range(1, len(first) + 1)]
    images = [n for n, cell in enumerate(first) if looks_like_image(cell)]
    texts = [n for n, cell in enumerate(first) if n not in images[:1] and not re.fullmatch(r"[\d.\s-]*", cell)]
    if images:
        columns[images[0]] = "url" if is_url(first[images[0]]) else "image"
    if len(texts) == 1:
        columns[texts[0]] = "caption"
    return columns


def _distinct(names: Sequence[str]) -> list[str]:
    """The names of columns, those that come again with a number."""
    return [name if names.index(name) == n else f"{name}_{n + 1}" for n, name in enumerate(names)]


def _text(path: Path) -> str:
    """A text file; bytes that are not UTF-8 become lone surrogates. Excel writes UTF-16 with a byte-order mark."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return data.decode("utf-16", "replace")
    text = data.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "surrogateescape")
    return text if "\n" in text else text.replace("\r", "\n")


def _records(name: str, lines: Sequence[str], separator: str) -> Iterator[tuple[str, list[str]]]:
    """The cells of each record and its place. A quoted cell may hold separators and line ends."""
    csv.field_size_limit(CELL_LIMIT)
    n = 0
    while n < len(lines):
        place, line = f"{name}:{n + 1}", lines[n]
        if not line.strip():
            n += 1
            continue
        cells, used = _quoted(lines[n : n + LINES_OF_A_CELL], separator) if '"' in line else (None, 0)
        if cells is None:
            cells, used = line.split(separator), 1
        n += used
        yield place, cells


def _quoted(lines: Sequence[str], separator: str) -> tuple[list[str] | None, int]:
    """The first record of lines with quotes and how many of them it takes; None if the quotes are not csv's."""
    for used in range(1, len(lines) + 1):
        try:
            # One string: csv would take the lines of a list for records of their own.
            (cells,) = csv.reader(["\n".join(lines[:used])], delimiter=separator, strict=True)
        except csv.Error as error:
            if "end of data" in str(error):
                continue
            return None, 0
        except ValueError:
            return None, 0
        return cells, used
    return None, 0
