"""Tables of pairs: csv, tsv, jsonl or parquet with one column of image paths and one of captions."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from fastvlp.batch import Dropped, Record
from fastvlp.data.sources.jsonlines import read_json_lines
from fastvlp.data.sources.paths import Images, read_inside, read_text
from fastvlp.errors import UserError, install

SUFFIXES = frozenset({".csv", ".tsv", ".jsonl", ".parquet"})
IMAGE_COLUMNS = ("image", "file", "filepath", "file_name", "filename", "image_path", "path")
CAPTION_COLUMNS = ("caption", "captions", "text", "title", "sentence")
CHINESE_COLUMNS = ("caption_zh", "captions_zh")
CAPTION_LIMIT = 1 << 24  # csv's own limit of 128 KiB a field is below what people have

Row = dict[str, Any]


def read(
    path: Path, *, image_column: str = "", caption_column: str = "", images: Images | None = None
) -> Iterator[Record | Dropped]:
    """Yields one record an image, with the captions of all its rows, English and Chinese (`caption_zh`); other columns travel
    from its first row.

    Image paths are relative to `images`, by default the table's folder, and must stay inside it. A parquet cell may
    hold the image itself: bytes, or {bytes, path} as the `datasets` library writes it.
    """
    root = images or path.parent
    for name, info, stored in _grouped(path, image_column, caption_column):
        key = str(PurePosixPath(name.replace("\\", "/")).with_suffix("")) if name else "row without an image path"
        if not name:
            yield Dropped(key=key, reason="row names no image")
            continue
        image = stored if stored is not None else read_inside(root, name, key)
        yield image if isinstance(image, Dropped) else Record(key=key, images=(image,), info=info)


def count(path: Path, *, image_column: str = "", caption_column: str = "") -> int:
    """How many items `read` will yield."""
    return sum(1 for _ in _grouped(path, image_column, caption_column))


def _grouped(path: Path, image_column: str, caption_column: str) -> Iterator[tuple[str, Row, bytes | None]]:
    """(image path, info, image bytes if the table holds them); rows of one path are one item."""
    by_name: dict[str, Row] = {}
    for number, row in enumerate(_rows(path)):
        if number == 0:
            image_column = _column(path, row, image_column, IMAGE_COLUMNS, "image", "--image-column")
            caption_column = _column(path, row, caption_column, CAPTION_COLUMNS, "caption", "--caption-column")
        cell = row.pop(image_column, None)
        texts = {"captions": _texts(row.pop(caption_column, None))}
        chinese = [text for name in CHINESE_COLUMNS for text in _texts(row.pop(name, None))]
        if any(map(str.strip, chinese)):
            texts["captions_zh"] = chinese
        row.pop("captions", None)  # beside another caption column
        info = {name: value for name, value in row.items() if isinstance(value, str | int | float | list | dict)}
        if isinstance(cell, bytes | dict):
            stored = cell if isinstance(cell, bytes) else cell.get("bytes")
            name = f"{path.stem}-{number:07d}"
            yield name, {**info, **texts}, stored if isinstance(stored, bytes) else b""
            continue
        name = str(cell).strip() if cell is not None else ""
        known = by_name.setdefault(name, info)
        for field, told in texts.items():
            known.setdefault(field, []).extend(told)
    yield from ((name, info, None) for name, info in by_name.items())


def _texts(cell: Any) -> list[str]:
    return [text for text in (cell if isinstance(cell, list) else [cell]) if isinstance(text, str)]


def _column(path: Path, row: Row, wanted: str, usual: tuple[str, ...], what: str, option: str) -> str:
    found = [name for name in ((wanted,) if wanted else usual) if name in row]
    if not found:
        raise UserError(
            f"{path}: no {what} column {repr(wanted) if wanted else 'by a usual name'}; "
            f"its columns are {', '.join(map(str, row))}; name one with {option}"
        )
    return found[0]


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
    csv.field_size_limit(CAPTION_LIMIT)
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
