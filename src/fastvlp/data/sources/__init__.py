"""One small module a public format, each with `read(path) -> Iterator[Record | Dropped]`; here one is chosen.

Modules of published annotations also have `files(path)`, what of the path they would read, and `read` takes where the images
are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fastvlp.batch import Dropped, Record
from fastvlp.data.sources import (
    coco,
    examples,
    features,
    folder,
    karpathy,
    nlvr,
    nlvr2,
    refcoco,
    snli_ve,
    table,
    vcr,
    vqa,
    webdataset,
)
from fastvlp.data.sources.paths import IMAGE_SUFFIXES, Images
from fastvlp.errors import UserError

Format = Literal[
    "table", "folder", "webdataset", "nlvr", "examples",
    "coco", "karpathy", "vqa", "nlvr2", "snli_ve", "refcoco", "vcr",
]  # fmt: skip
# In the order in which a folder is tried.
PUBLISHED: dict[Format, Any] = {
    "coco": coco, "vqa": vqa, "snli_ve": snli_ve, "refcoco": refcoco, "vcr": vcr, "karpathy": karpathy, "nlvr2": nlvr2,
}  # fmt: skip

FORMATS_HELP = """\
  table       a csv, tsv, jsonl or parquet file with a column of image paths and one of captions
  folder      images with a .txt of the same name beside each, one caption a line
  webdataset  a tar, or a folder of tars: image with .txt or .json
  nlvr        Cornell NLVR: train/train.json, train/images/, dev and test likewise
  examples    a folder with examples.jsonl and images.zip
  coco        COCO's folder: annotations/captions_*.json, instances_*.json or both, and images
  karpathy    dataset_coco.json, dataset_flickr30k.json
  vqa         VQA's *_OpenEnded_*_questions.json, its *_annotations.json beside them
  nlvr2       NLVR2's data/train.json, dev.json, test1.json, or one of them
  snli_ve     snli_ve_*.jsonl, or one of them
  refcoco     a folder with instances.json and refs(*).json, or the latter
  vcr         VCR's train.jsonl, val.jsonl, test.jsonl and vcr1images/
The last seven take the folder of the images as --images."""


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
    if isinstance(source.images, Path) and not source.images.is_dir():
        raise UserError(f"--images {source.images}: no such folder; give the one that image paths start from")
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
    module = PUBLISHED[source.format]
    if not module.files(source.path):
        raise UserError(f"{source.path}: nothing of the format {source.format} is here:\n{FORMATS_HELP}")
    return module.read(source.path, source.images)


def count(source: Source) -> int | None:
    """How many items `read` will yield, where that is cheap to know: a tar must be read to its end for it, and large JSON
    files too."""
    match source.format:
        case "table":
            return table.count(source.path, image_column=source.image_column, caption_column=source.caption_column)
        case "folder":
            return folder.count(source.path)
        case "nlvr":
            return nlvr.count(source.path)
        case "examples":
            return examples.count(source.path)
        case _:
            return None


def guess(path: Path) -> Format:
    """The format that a path looks like; UserError listing the formats when it looks like none."""
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    if path.is_file():
        named: dict[str, Format] = {"snli_ve_*.jsonl": "snli_ve", "dataset_*.json": "karpathy", "refs(*).*": "refcoco"}
        if known := next((format for pattern, format in named.items() if path.match(pattern)), None):
            return known
        if path.suffix.lower() in table.SUFFIXES:
            return "table"
        if path.name.endswith(webdataset.TAR_SUFFIXES):
            return "webdataset"
    elif (path / "examples.jsonl").is_file() and (path / "images.zip").is_file():
        return "examples"
    elif nlvr.splits(path):
        return "nlvr"
    elif known := next((name for name, module in PUBLISHED.items() if _looks_like(name, path)), None):
        return known
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


def _looks_like(format: Format, path: Path) -> bool:
    """Whether a folder holds files of a published format; those of two have names that others have too."""
    files = PUBLISHED[format].files(path)
    return bool(files) and {"vcr": (path / "vcr1images").is_dir(), "nlvr2": "test1" in files}.get(format, True)
