"""One small module a public format, each with `read(path) -> Iterator[Record | Dropped]`; here one is chosen."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fastvlp.batch import Dropped, Record
from fastvlp.data.sources import examples, features, folder, nlvr, table, webdataset
from fastvlp.data.sources.paths import IMAGE_SUFFIXES, Images
from fastvlp.errors import UserError

Format = Literal["table", "folder", "webdataset", "nlvr", "examples"]

FORMATS_HELP = """\
  table       a csv, tsv, jsonl or parquet file with a column of image paths and one of captions
  folder      images with a .txt of the same name beside each, one caption a line
  webdataset  a tar, or a folder of tars: image with .txt or .json
  nlvr        Cornell NLVR: train/train.json, train/images/, dev and test likewise
  examples    a folder with examples.jsonl and images.zip"""


@dataclass(frozen=True, kw_only=True)
class Source:
    """What is to be read and how. images: the folder that image paths start from, or that there are none. features: a
    detector's regions that come along with the records. The columns are of tables."""

    path: Path
    format: Format
    image_column: str = ""
    caption_column: str = ""
    images: Images | None = None
    features: Path | None = None


def read(source: Source) -> Iterator[Record | Dropped]:
    items = _read(source)
    return items if source.features is None else features.attached(items, source.features)


def _read(source: Source) -> Iterator[Record | Dropped]:
    match source.format:
        case "table":
            columns = {"image_column": source.image_column, "caption_column": source.caption_column}
            return table.read(source.path, **columns, images=source.images)
        case "folder":
            return folder.read(source.path)
        case "webdataset":
            return webdataset.read(source.path)
        case "nlvr":
            return nlvr.read(source.path)
        case "examples":
            return examples.read(source.path)


def count(source: Source) -> int | None:
    """How many items `read` will yield, where that is cheap to know: a tar must be read to its end for it."""
    match source.format:
        case "table":
            return table.count(source.path, image_column=source.image_column, caption_column=source.caption_column)
        case "folder":
            return folder.count(source.path)
        case "webdataset":
            return None
        case "nlvr":
            return nlvr.count(source.path)
        case "examples":
            return examples.count(source.path)


def guess(path: Path) -> Format:
    """The format that a path looks like; UserError listing the formats when it looks like none."""
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    if path.is_file():
        if path.suffix.lower() in table.SUFFIXES:
            return "table"
        if path.name.endswith(webdataset.TAR_SUFFIXES):
            return "webdataset"
    elif (path / "examples.jsonl").is_file() and (path / "images.zip").is_file():
        return "examples"
    elif nlvr.splits(path):
        return "nlvr"
    elif webdataset.tars(path):
        return "webdataset"
    elif any(file.suffix.lower() in IMAGE_SUFFIXES for file in path.rglob("*")):
        tables = sorted(file.name for file in path.iterdir() if file.suffix.lower() in table.SUFFIXES)
        if tables:
            raise UserError(
                f"{path}: holds images and a table; name the table itself, {path / tables[0]}, or --format folder"
            )
        return "folder"
    raise UserError(f"{path}: not recognised; name its format with --format:\n{FORMATS_HELP}")
