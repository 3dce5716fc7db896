"""Tables of pairs: csv, tsv, jsonl, a JSON list or parquet with a column of image paths and one or several of captions."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastvlp.batch import Dropped
from fastvlp.data.sources.columnar import read_parquet
from fastvlp.data.sources.delimited import Header, Row, image_name, looks_like_image, plain_name, read_delimited
from fastvlp.data.sources.interface import Match, Note
from fastvlp.data.sources.row_fields import IMAGE_COLUMNS, USUAL_COLUMNS, find_columns
from fastvlp.data.sources.row_source import RowSource, Table
from fastvlp.data.sources.source_files import read_json, read_json_lines
from fastvlp.errors import UserError

SUFFIXES = frozenset({".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".parquet", ".token"})
# Flickr8k and Flickr30k: `1.jpg#0<tab>caption`, and csv with another ending.
FLICKR = re.compile(r".*\.token(\.txt)?|captions\.txt|results(_\d+)?\.csv", re.IGNORECASE)
# Flickr8k's lists of the images of each split, `Flickr_8k.trainImages.txt`.
_LIST = re.compile(r".*\.(train|dev|val|test)Images\.txt", re.IGNORECASE)
# Shards as on the hub: `train-00000-of-00002.parquet`, `train/0000.parquet`.
_SHARD = re.compile(r"(.+?)-\d{5}-of-\d{5}(-[0-9a-f]+)?")


@dataclass(frozen=True, kw_only=True)
class TableSource(RowSource):
    """A table in a file, or parquet files in a folder, which are one source: their names say of which split they are."""

    name = "table"
    summary = "a csv, tsv, json, jsonl or parquet file (or folder of parquet) with columns of image paths and captions"

    separator: str = ""
    """Between the cells of a csv or tsv; by default found by its first line."""
    header: Header = "auto"
    """Whether the first line of a csv or tsv names the columns."""

    @classmethod
    def match(cls, path: Path) -> Match:
        if path.is_dir():
            return Match.SUFFIX if _shards(path) else Match.NONE
        return Match.SUFFIX if path.suffix.lower() in SUFFIXES or FLICKR.fullmatch(path.name) else Match.NONE

    def tables(self, path: Path) -> Iterator[Table]:
        files = _shards(path) if path.is_dir() else [path]
        if not files:
            raise UserError(
                f"{path}: no parquet files are in this folder; give the path of a table, or all by a pattern such as "
                f"'{path / '*.csv'}' (in quotes)"
            )
        columns = (self.image_column, *self.caption_column.split("+"))
        usual = {*USUAL_COLUMNS, *(plain_name(name) for name in columns if name)}
        for file in files:
            split = _split_of(file, path)
            suffix = file.suffix.lower()
            if suffix in (".csv", ".tsv", ".txt", ".token"):
                lines = read_delimited(file, self.separator, self.header, usual)
                yield Table(path=file, rows=_with_splits(lines, file.parent), split=split)
            elif suffix in (".jsonl", ".ndjson"):
                yield Table(path=file, rows=_lines(file), split=split, columns_fixed=False)
            elif suffix == ".json":
                yield Table(path=file, rows=_json_rows(file), split=split, columns_fixed=False)
            elif suffix == ".parquet":
                rows, names = read_parquet(file)
                yield Table(path=file, rows=rows, split=split, class_names=names)
            else:
                raise UserError(f"{file}: a table ends in {', '.join(sorted(SUFFIXES))}")


def _shards(folder: Path) -> list[Path]:
    """The parquet files in a folder or its sub-folders."""
    files = sorted(folder.glob("*.parquet")) or sorted((*folder.glob("*/*.parquet"), *folder.glob("*/*/*.parquet")))
    return [file for file in files if file.stem != "metadata"]


def _split_of(file: Path, path: Path) -> str:
    """The split that a shard's name or folder says it is of; empty if it says none."""
    if match := _SHARD.fullmatch(file.stem):
        return match[1]
    if file == path or file.suffix.lower() != ".parquet":
        return ""
    if file.parent != path:
        return file.parent.name
    return file.stem if file.stem.lower() in ("train", "val", "valid", "validation", "dev", "test") else ""


def _with_splits(rows: Iterator[Row | Dropped], folder: Path) -> Iterator[Row | Dropped | Note]:
    """The rows with the split whose list beside the table has their image, where there are such lists and the table does not
    name a split itself."""
    lists = {file: match[1].lower() for file in sorted(folder.iterdir()) if (match := _LIST.fullmatch(file.name))}
    split_of = {name: split for file, split in lists.items() for name in file.read_text("utf-8", "replace").split()}
    for row in rows:
        if not split_of or not isinstance(row, Row) or "split" in row.cells:
            yield row
            continue
        names = {image_name(cell) for cell in row.cells.values() if isinstance(cell, str)}
        split = next((split_of[name] for name in sorted(names) if name in split_of), None)
        if split is None:
            yield Note(text="rows of images in none of the lists of splits beside the table", example=row.place)
        yield Row(row.place, {**row.cells, "split": split})


def _lines(path: Path) -> Iterator[Row | Dropped | Note]:
    for number, row in enumerate(read_json_lines(path), 1):
        yield row if isinstance(row, Dropped) else Row(f"{path.name}:{number}", row)


def _json_rows(path: Path) -> Iterator[Row | Dropped | Note]:
    """The rows of a JSON file: a list, a list inside an object, {image: captions}, or JSON lines."""
    try:
        content = read_json(path)
    except UserError:
        first = next(iter(read_json_lines(path)), None)
        if first is None or isinstance(first, Dropped):
            raise
        yield from _lines(path)
        return
    for number, row in enumerate(_rows_of(path, content), 1):
        place = f"{path.name}: row {number}"
        yield Row(place, row) if isinstance(row, dict) else Dropped(key=place, reason="row is no object {...}")


def _rows_of(path: Path, content: Any) -> list[Any]:
    if isinstance(content, list):
        return content
    if isinstance(content, Mapping):
        if content and all(looks_like_image(name) for name in content):
            return [{"image": name, **_as_cells(value)} for name, value in content.items()]
        if find_columns(content, IMAGE_COLUMNS) and not isinstance(content.get("images"), list):
            return [dict(content)]
        for rows in content.values():
            if isinstance(rows, list) and rows and isinstance(rows[0], dict) and find_columns(rows[0], IMAGE_COLUMNS):
                return rows
    raise UserError(f"{path}: holds no list of rows such as {json.dumps([{'image': '1.jpg', 'caption': 'a dog'}])}")


def _as_cells(value: Any) -> dict[str, Any]:
    """Returns the fields or captions that a file gives for an image by its name."""
    return dict(value) if isinstance(value, Mapping) else {"caption": value}
