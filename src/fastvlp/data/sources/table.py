"""Tables of pairs: csv, tsv, jsonl or parquet with one column of image paths and one of captions."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from fastvlp.batch import Dropped, Record
from fastvlp.data.sources.interface import ImagePathSource, Match
from fastvlp.data.sources.source_files import read_image, read_json_lines, read_text
from fastvlp.errors import UserError, install

SUFFIXES = frozenset({".csv", ".tsv", ".jsonl", ".parquet"})
IMAGE_COLUMNS = ("image", "file", "filepath", "file_name", "filename", "image_path", "path")
CAPTION_COLUMNS = ("caption", "captions", "text", "title", "sentence")
CHINESE_COLUMNS = ("caption_zh", "captions_zh")
CELL_LIMIT = 1 << 24  # csv's own limit of 128 KiB a cell is below the longest captions

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class TableSource(ImagePathSource):
    """Rows with an image and a caption.

    Rows of one image path are one record, with the captions of all, English and Chinese (`caption_zh`); other columns are
    those of its first row. Image paths must stay inside the folder that they start from. A parquet cell may hold the image
    itself: bytes, or {bytes, path} as the `datasets` library writes it.
    """

    name = "table"
    summary = "a csv, tsv, jsonl or parquet file with a column of image paths and one of captions"

    image_column: str = ""
    """Column of image paths; by default one with a usual name."""
    caption_column: str = ""
    """Column of captions; by default one with a usual name."""

    @classmethod
    def match(cls, path: Path) -> Match:
        return Match.SUFFIX if path.suffix.lower() in SUFFIXES and path.is_file() else Match.NONE

    def read(self, path: Path) -> Iterator[Record | Dropped]:
        """Yields one record an image."""
        root = self.image_folder(path.parent)
        for name, info, stored in self._images(path):
            if not name:
                yield Dropped(key="row without an image path", reason="row names no image")
                continue
            key = str(PurePosixPath(name.replace("\\", "/")).with_suffix(""))
            image = stored if stored is not None else read_image(root, name, key)
            yield image if isinstance(image, Dropped) else Record(key=key, images=(image,), info=info)

    def count(self, path: Path) -> int:
        return sum(1 for _ in self._images(path))

    def _images(self, path: Path) -> Iterator[tuple[str, Row, bytes | None]]:
        """(image path, info, image where the table holds it); rows of one path are one item."""
        by_name: dict[str, Row] = {}
        image_column = caption_column = ""
        for number, row in enumerate(_rows(path)):
            if number == 0:
                image_column = _column(path, row, "image_column", self.image_column, IMAGE_COLUMNS)
                caption_column = _column(path, row, "caption_column", self.caption_column, CAPTION_COLUMNS)
            cell = row.pop(image_column, None)
            texts = {"captions": _texts(row.pop(caption_column, None))}
            chinese = [text for name in CHINESE_COLUMNS for text in _texts(row.pop(name, None))]
            if any(map(str.strip, chinese)):
                texts["captions_zh"] = chinese
            row.pop("captions", None)  # beside another caption column
            info = {name: value for name, value in row.items() if isinstance(value, str | int | float | list | dict)}
            if isinstance(cell, bytes | dict):
                stored = cell if isinstance(cell, bytes) else cell.get("bytes")
                yield f"{path.stem}-{number:07d}", {**info, **texts}, stored if isinstance(stored, bytes) else b""
                continue
            name = str(cell).strip() if cell is not None else ""
            first = by_name.setdefault(name, info)
            for field, captions in texts.items():
                first.setdefault(field, []).extend(captions)
        yield from ((name, info, None) for name, info in by_name.items())


def _texts(cell: Any) -> list[str]:
    return [text for text in (cell if isinstance(cell, list) else [cell]) if isinstance(text, str)]


def _column(path: Path, row: Row, option: str, given: str, usual: Sequence[str]) -> str:
    """The column given, or the first with a usual name."""
    columns = [name for name in ((given,) if given else usual) if name in row]
    if not columns:
        raise UserError(
            f"{path}: no {option.replace('_', ' ')} {repr(given) if given else 'with a usual name'}; "
            f"its columns are {', '.join(map(str, row))}; name one with `{option}`"
        )
    return columns[0]


def _rows(path: Path) -> Iterator[Row]:
    match path.suffix.lower():
        case ".csv" | ".tsv":
            return _delimited(path, "\t" if path.suffix.lower() == ".tsv" else ",")
        case ".jsonl":
            return read_json_lines(path)
        case ".parquet":
            return _parquet(path)
    raise UserError(f"{path}: a table ends in {', '.join(sorted(SUFFIXES))}")


def _delimited(path: Path, delimiter: str) -> Iterator[Row]:
    csv.field_size_limit(CELL_LIMIT)
    reader = csv.DictReader(io.StringIO(read_text(path), newline=""), delimiter=delimiter, strict=True)
    try:
        for row in reader:
            if None in row:
                raise UserError(
                    f"{path}:{reader.line_num}: more cells than columns; quote a cell that holds a separator"
                )
            yield row
    except csv.Error as error:
        raise UserError(f"{path}:{reader.line_num}: {error}") from None


def _parquet(path: Path) -> Iterator[Row]:
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError:
        raise UserError(f"{path}: reading parquet needs pyarrow; {install('parquet')}") from None
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=256):
                yield from batch.to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: not readable as parquet ({error})") from None
