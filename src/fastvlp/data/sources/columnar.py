"""Reading parquet and Arrow files row by row. A column or a row that cannot be read is left out and named."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastvlp.batch import Dropped
from fastvlp.data.sources.delimited import Row
from fastvlp.data.sources.interface import Note
from fastvlp.errors import UserError, install
from fastvlp.plain_json import parse_json

ROWS = 256
ClassNames = Mapping[str, Sequence[str]]


def read_parquet(path: Path) -> tuple[Iterator[Row | Dropped | Note], ClassNames]:
    """The rows of a parquet file, and the names of the classes that its schema has. Raises UserError if it is none."""
    pa = _arrow(path)
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path)
        return _parquet_rows(path, file), class_names(file.schema_arrow)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: not readable as parquet ({error})") from None


def read_arrow(path: Path) -> tuple[Iterator[Row | Dropped | Note], ClassNames]:
    """The rows of an Arrow file or stream, as the `datasets` library writes them. Raises UserError if it is none."""
    pa = _arrow(path)
    try:
        source = pa.memory_map(str(path))
        try:
            reader = pa.ipc.open_stream(source)
            return _rows(path, iter(reader)), class_names(reader.schema)
        except pa.ArrowInvalid:
            whole = pa.ipc.open_file(source)
            batches = (whole.get_batch(i) for i in range(whole.num_record_batches))
            return _rows(path, batches), class_names(whole.schema)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: not readable as Arrow ({error})") from None


def class_names(schema: Any) -> dict[str, list[str]]:
    """The names of the classes of each ClassLabel column, which the `datasets` library keeps in the schema."""
    try:
        features = parse_json((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
        return {name: list(one["names"]) for name, one in features.items() if one.get("_type") == "ClassLabel"}
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}


def _arrow(path: Path) -> Any:
    try:
        import pyarrow
    except ImportError:
        raise UserError(f"{path}: reading parquet needs pyarrow; {install('parquet')}") from None
    return pyarrow


def _parquet_rows(path: Path, file: Any) -> Iterator[Row | Dropped | Note]:
    """A group of rows in which a column is damaged is read without that column."""
    import pyarrow as pa

    start = 0
    with file:
        for group in range(file.num_row_groups):
            count = file.metadata.row_group(group).num_rows
            try:
                yield from _rows(path, file.iter_batches(batch_size=ROWS, row_groups=[group]), start)
            except (pa.ArrowException, OSError):
                good, notes = _readable_columns(path, file, group)
                yield from notes
                if good:
                    table = file.read_row_group(group, columns=good)
                    yield from _rows(path, table.to_batches(max_chunksize=ROWS), start)
            start += count


def _readable_columns(path: Path, file: Any, group: int) -> tuple[list[str], list[Note | Dropped]]:
    import pyarrow as pa

    good: list[str] = []
    notes: list[Note | Dropped] = []
    for name in file.schema_arrow.names:
        try:
            file.read_row_group(group, columns=[name])
            good.append(name)
        except (pa.ArrowException, OSError):
            notes.append(Note(text=f"column {name[:40]} is left out: it cannot be read", example=path.name))
    if not good:
        notes.append(Dropped(key=f"{path.name}: group {group} of rows", reason="no column can be read"))
    return good, notes


def _rows(path: Path, batches: Any, start: int = 0) -> Iterator[Row | Dropped | Note]:
    for batch in batches:
        for first in range(0, batch.num_rows, ROWS):
            part = batch.slice(first, ROWS)
            yield from _cells(path, part, start)
            start += part.num_rows


def _cells(path: Path, batch: Any, start: int) -> Iterator[Row | Dropped | Note]:
    """The rows of a batch. Values that Python has no form for, such as times out of its range, are left out by column; a text
    that is not UTF-8 drops its row."""
    try:
        for number, row in enumerate(batch.to_pylist()):
            yield Row(f"{path.name}:{start + number}", row)
        return
    # Arrow's conversions raise its own errors, OverflowError, UnicodeDecodeError and others.
    except Exception:
        columns = {name: _values(batch.column(i)) for i, name in enumerate(batch.schema.names)}
    for name, values in columns.items():
        if values is None:
            yield Note(text=f"column {name[:40]} is left out: its values have no form in Python", example=path.name)
    for number in range(batch.num_rows):
        place = f"{path.name}:{start + number}"
        row = {name: values[number] for name, values in columns.items() if values is not None}
        bad = [name for name, value in row.items() if isinstance(value, Exception)]
        yield Dropped(key=place, reason=f"column {bad[0][:40]} cannot be read") if bad else Row(place, row)


def _values(column: Any) -> list[Any] | None:
    """The values of a column, an exception in the place of each that cannot be read; None if none can."""
    values: list[Any] = []
    for cell in column:
        try:
            values.append(cell.as_py())
        except Exception as error:
            values.append(error)
    return None if values and all(isinstance(value, Exception) for value in values) else values
