"""The common base of formats with rows. Rows with an image and texts become one record for each image."""

from __future__ import annotations

import abc
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from fastvlp.batch import Dropped, Record
from fastvlp.data.records.captions import caption_texts, parse_list
from fastvlp.data.records.schema import LISTS_OF_OBJECTS, is_absent
from fastvlp.data.sources.delimited import Row, image_name
from fastvlp.data.sources.interface import ImagePathSource, Item, Note
from fastvlp.data.sources.row_fields import (
    CHINESE_COLUMNS,
    IMAGE_COLUMNS,
    URL_COLUMNS,
    caption_columns,
    find_columns,
    short,
    storable,
    take_captions,
    take_label,
    task_fields,
)
from fastvlp.data.sources.source_files import find_image, image_record, is_url
from fastvlp.errors import UserError

# Folders from which the paths of a table may start, if the images are not beside it.
USUAL_FOLDERS = (
    *("images", "Images", "image", "imgs", "img", "pictures", "Flickr8k_Dataset", "Flicker8k_Dataset"),
    *("flickr30k_images", "flickr30k-images", "Flickr30k_Dataset"),
)
# Lists to which further rows of an image add entries. Expressions refer to the objects of their own row, so they are not among
# these.
GROWING = frozenset(LISTS_OF_OBJECTS) - {"objects", "expressions", "expressions_zh"}


@dataclass(frozen=True, kw_only=True)
class Table:
    """The rows of one file.

    Attributes:
        path: the file.
        rows: its rows, and those that cannot be read.
        split: split of the file, if its name states one.
        columns_fixed: whether every row has the columns of the first one.
        class_names: names of the classes, for columns that hold numbers of classes.
    """

    path: Path
    rows: Iterator[Row | Dropped | Note]
    split: str = ""
    columns_fixed: bool = True
    class_names: Mapping[str, Sequence[str]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class RowSource(ImagePathSource):
    """A format of rows with an image and texts.

    Rows with the same image path become one record, with the captions of all rows, English and Chinese (`caption_zh`), and with
    their questions and statements. Other columns are taken from the first row. A cell may hold the image itself: bytes, or
    {bytes, path}.
    """

    image_column: str = ""
    """Column of image paths; by default one with a usual name."""
    caption_column: str = ""
    """Column of captions, or several joined by +; by default those with usual names."""

    @abc.abstractmethod
    def tables(self, path: Path) -> Iterator[Table]:
        """Yields the tables at `path`."""

    def read(self, path: Path) -> Iterator[Item]:
        """Yields one record for each image."""
        for table in self.tables(path):
            reading = _Reading(table, self)
            root = self.image_folder(table.path.parent)
            for row in table.rows:
                if isinstance(row, Row):
                    yield from reading.add(row)
                else:
                    yield row
            yield from reading.notes()
            reading.check()
            yield from reading.records(root)

    def count(self, path: Path) -> int | None:
        names, own = set[tuple[Path, tuple[str, ...]]](), 0
        for table in self.tables(path):
            reading = _Reading(table, self)
            for row in table.rows:
                own += sum(1 for _ in reading.add(row)) if isinstance(row, Row) else 1
            names |= {(table.path, name) for name in reading.by_name}
        return len(names) + own


class _Reading:
    """Reads one table. Keeps its columns, and the images read so far."""

    def __init__(self, table: Table, options: RowSource):
        self.table = table
        self.options = options
        self.by_name: dict[tuple[str, ...], dict[str, Any]] = {}
        self.columns: list[str] = []
        self.any_image = self.any_text = False
        self.left_out: dict[str, int] = {}
        self.differing: dict[str, int] = {}

    def add(self, row: Row) -> Iterator[Item]:
        """Reads a row. Yields its record if it holds the image itself, and its faults."""
        cells = dict(row.cells)
        if not self.columns:
            self.columns = [str(name) for name in cells]
            if self.table.columns_fixed:
                self._check_columns(cells)
        image_column = self._image_column(cells)
        cell = cells.pop(image_column, None) if image_column is not None else None
        captions = caption_columns(cells, self.options.caption_column)
        self.any_image |= image_column is not None
        info, notes = self._info(cells, captions, row.place)
        yield from notes
        stored = cell if isinstance(cell, bytes) else cell.get("bytes") if isinstance(cell, dict) else None
        if isinstance(stored, bytes) and stored:
            key = f"{self.table.path.stem}-{row.place.rpartition(':')[2].zfill(7)}"
            file = cell.get("path") if isinstance(cell, dict) else None
            yield Record(key=key, images=(stored,), info=info, file=file if isinstance(file, str) else "")
            return
        names = tuple(image_name(name) for name in _names(cell))
        if not names or not all(names):
            yield Dropped(key=row.place, reason="row names no image")
            return
        self._merge(names, info)

    def check(self) -> None:
        """Raises UserError if no row had the columns that are needed."""
        if self.columns and not self.any_image:
            raise self._no_column("image_column", self.options.image_column)
        if self.columns and not self.any_text:
            raise self._no_column("caption_column", self.options.caption_column)
        if self.by_name and all(is_url(name) for names in self.by_name for name in names):
            raise url_error(self.table.path, self.columns, self.options)

    def notes(self) -> Iterator[Note]:
        for column in self.left_out:
            text = (
                f"column {short(column)} is left out: it holds bytes or other values that are no text, number or list"
            )
            yield Note(text=text, example=self.table.path.name)
        for column in self.differing:
            text = f"rows of one image differ in {short(column)}; that of the first is used"
            yield Note(text=text, example=self.table.path.name)

    def records(self, root: Path | None) -> Iterator[Item]:
        """Yields the records of the images that the table names by their paths."""
        first = next(iter(self.by_name), None)
        if first is not None and root is not None and self.options.images is None:
            folder = _usual_folder(root, first[0])
            if folder is not None:
                yield Note(text=f"image paths start from {folder.name}", example=self.table.path.name)
                root = folder
        for names, info in self.by_name.items():
            name = names[0].replace("\\", "/").removeprefix("./")
            yield image_record(
                str(PurePosixPath(name).with_suffix("")) if name.strip("/.") else name, info, root, *names
            )

    def _info(self, cells: dict[str, Any], captions: Sequence[str], place: str) -> tuple[dict[str, Any], list[Note]]:
        """Returns the fields of a row's record."""
        chinese = [
            text for name in CHINESE_COLUMNS if name not in captions for text in caption_texts(cells.pop(name, None))
        ]
        for one in (cells.get(name) for name in captions):
            chinese += caption_texts(one.get("zh")) if isinstance(one, dict) else []
        tasks = task_fields(cells)
        texts, notes = take_captions(cells, captions, place)
        has_column = bool(captions) or "captions" in tasks
        # There is another caption column, whose captions come first.
        more = caption_texts(cells.pop("captions", None)) if "captions" not in captions else []
        if more and self.options.caption_column:
            notes.append(Note(text=f"captions is left out beside {short(self.options.caption_column)}", example=place))
            more = []
        label = take_label(cells, self.table.class_names)
        info = {}
        for name, value in cells.items():
            kept = storable(value)
            if kept is not None:
                info[str(name)] = kept
            elif not is_absent(value):
                self.left_out.setdefault(str(name), 1)
        fields = tasks | {"captions": [*texts, *tasks.get("captions", []), *more]}
        if not has_column and not fields["captions"]:
            del fields["captions"]
        self.any_text |= has_column or label is not None or bool(tasks) or bool(LISTS_OF_OBJECTS.keys() & info.keys())
        self.any_text |= bool(chinese) or bool(more)
        if label is not None:
            fields["label"] = label
        if chinese:
            fields["captions_zh"] = chinese
        if self.table.split and is_absent(info.get("split")):
            fields["split"] = self.table.split
        return {**info, **fields}, notes

    def _merge(self, names: tuple[str, ...], info: dict[str, Any]) -> None:
        """Joins a row with the earlier rows of the same image."""
        if names not in self.by_name:
            self.by_name[names] = info
            return
        first = self.by_name[names]
        for name, value in info.items():
            if name in ("captions", "captions_zh") or (name in GROWING and isinstance(value, list)):
                first[name] = [*(old if isinstance(old := first.get(name), list) else []), *value]
            elif name not in first:
                first[name] = value
            elif first[name] != value:
                self.differing.setdefault(name, 1)

    def _image_column(self, cells: Mapping[str, Any]) -> str | None:
        if given := self.options.image_column:
            return given if given in cells else None
        usual = find_columns(cells, IMAGE_COLUMNS)
        there = [name for name in usual if not is_absent(cells[name])]
        stored = [str(name) for name, cell in cells.items() if _holds_image(cell)]
        named = [name for name in find_columns(cells, ("image_id", "img_id", "id")) if _is_path(cells[name])]
        urls = find_columns(cells, URL_COLUMNS)
        # A column of pictures is preferred to a column of their names.
        first = [name for name in there if name in stored]
        return next(iter((*first, *there, *usual, *stored, *named, *urls)), None)

    def _check_columns(self, cells: Mapping[str, Any]) -> None:
        """Raises UserError if the first row of a table lacks a column."""
        image = self._image_column(cells)
        if image is None:
            raise self._no_column("image_column", self.options.image_column)
        rest = {name: value for name, value in cells.items() if name != image}
        others = {*LISTS_OF_OBJECTS, "question", "conversations", "messages", "captions_zh", "caption_zh"}
        has_other = bool(others & {*map(str, rest)}) or take_label(dict(rest), {}) is not None
        if not caption_columns(rest, self.options.caption_column) and (self.options.caption_column or not has_other):
            raise self._no_column("caption_column", self.options.caption_column)

    def _no_column(self, option: str, given: str) -> UserError:
        names = ", ".join(map(short, self.columns[:20])) + (", …" if len(self.columns) > 20 else "")
        return UserError(
            f"{self.table.path}: no {option.replace('_', ' ')} {repr(given) if given else 'with a usual name'}; "
            f"its columns are {names}; name one with `{option}`"
        )


def url_error(path: Path, columns: Sequence[str], options: RowSource) -> UserError:
    """Returns the error for a table of URLs, with the command that downloads them."""
    url = options.image_column or next(
        iter(find_columns(dict.fromkeys(columns), (*URL_COLUMNS, *IMAGE_COLUMNS))), "url"
    )
    caption = next(iter(caption_columns(dict.fromkeys(columns), options.caption_column)), "caption")
    format = path.suffix.lower().lstrip(".") or "csv"
    values = {
        "url_list": path,
        "input_format": format,
        "url_col": url,
        "caption_col": caption,
        "output_format": "webdataset",
        "output_folder": "downloaded",
    }
    command = " ".join(["img2dataset", *(f"--{name} {value}" for name, value in values.items())])
    first = (
        f"Its first line names no columns: write one above, with {' and '.join(columns)}. "
        if headless(path, url)
        else ""
    )
    return UserError(
        f"{path}: its images are URLs, and an import downloads none. {first}Download them with `{command}`, then import the "
        f"folder `downloaded`"
    )


def headless(path: Path, column: str) -> bool:
    """Whether the first line of a csv or tsv file does not contain the name of the column."""
    if path.suffix.lower() not in (".csv", ".tsv"):
        return False
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        return column not in file.readline()


def _names(cell: Any) -> list[str]:
    """Returns the paths of a row's images: one, or several for a record of several images."""
    if isinstance(cell, dict):
        cell = cell.get("path")
    if isinstance(cell, str) and cell.strip().startswith("["):
        cell = parse_list(cell)
    if isinstance(cell, list):
        return [name for part in cell for name in _names(part)]
    return [] if is_absent(cell) or isinstance(cell, bytes) else [str(cell)]


def _holds_image(cell: Any) -> bool:
    """Whether a cell holds a picture as the `datasets` library writes it, or encoded bytes."""
    return isinstance(cell, bytes) or (isinstance(cell, dict) and cell.keys() == {"bytes", "path"})


def _is_path(cell: Any) -> bool:
    return isinstance(cell, str) and "." in cell


def _usual_folder(root: Path, name: str) -> Path | None:
    """Returns the usual folder that contains an image, if `root` itself does not."""
    path = None if is_url(name) else find_image(root, name)
    if path is None or path.exists():
        return None
    folders = (root / folder for folder in USUAL_FOLDERS)
    return next(
        (one for one in folders if one.is_dir() and (p := find_image(one, name)) is not None and p.exists()), None
    )
