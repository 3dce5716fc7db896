"""A folder of images with a table of them, `metadata.csv` or `metadata.jsonl` (the `datasets` library's ImageFolder)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from fastvlp.data.sources.interface import Match
from fastvlp.data.sources.row_source import RowSource, Table
from fastvlp.data.sources.split_names import USUAL, usual_split
from fastvlp.data.sources.table import TableSource

NAMES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")


@dataclass(frozen=True, kw_only=True)
class ImageFolderSource(RowSource):
    """Images with their captions and other fields in a table; one such folder, or one for each split."""

    name = "imagefolder"
    summary = "a folder with metadata.csv or metadata.jsonl among its images, or one such folder for each split"

    @classmethod
    def match(cls, path: Path) -> Match:
        return Match.NAMES if path.is_dir() and _files(path) else Match.NONE

    def tables(self, path: Path) -> Iterator[Table]:
        for file in _files(path):
            split = usual_split(file.parent.name) if file.parent != path else ""
            for table in TableSource().tables(file):
                yield replace(table, split=split if split in USUAL else table.split)


def _files(path: Path) -> list[Path]:
    return sorted(file for name in NAMES for file in (*path.glob(name), *path.glob(f"*/{name}")))
