"""Reading the items of a published benchmark: rows of a JSON file that name pictures and texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastvlp.batch import Dropped
from fastvlp.data.sources.source_files import read_json, read_json_lines
from fastvlp.errors import UserError
from fastvlp.eval.picture_files import PictureFiles, PictureFolder

Row = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class ItemFile:
    """The rows of one file.

    Attributes:
        path: the file.
        rows: its rows, in order.
    """

    path: Path
    rows: Sequence[Row]

    def texts(self, field: str) -> list[str]:
        """A field of all rows. Raises UserError if a row has no text in it."""
        return [
            self._checked(n, field, isinstance(row.get(field), str) and row[field].strip() != "")
            for n, row in self._all()
        ]

    def names(self, field: str) -> list[str | int]:
        """The field that names the picture, a text or a number. Raises UserError if a row has neither."""
        return [
            self._checked(n, field, isinstance(row.get(field), str | int) and row[field] != "")
            for n, row in self._all()
        ]

    def truths(self, field: str) -> list[bool]:
        """A field with 0 or 1 in all rows. Raises UserError for anything else."""
        return [bool(self._checked(n, field, row.get(field) in (0, 1))) for n, row in self._all()]

    def _all(self) -> Sequence[tuple[int, Row]]:
        return list(enumerate(self.rows, 1))

    def _checked(self, number: int, field: str, fits: bool) -> Any:
        row = self.rows[number - 1]
        if not fits:
            value = f"has {row[field]!r} in" if field in row else "lacks"
            raise UserError(
                f"{self.path}: item {number} {value} the field {field!r} (its fields: {', '.join(sorted(row)) or 'none'}); an "
                f"evaluation leaves no item out: give the file in the form in which it was published"
            )
        return row[field]


def read_items(path: Path) -> ItemFile:
    """The rows of a .jsonl, or of a .json with a list of rows or with rows by their number. Raises UserError for a file that
    has another form or no row."""
    rows: list[Any]
    if path.suffix == ".json":
        content = read_json(path)
        rows = list(content.values()) if isinstance(content, dict) else content if isinstance(content, list) else []
    else:
        rows = list(read_json_lines(path))
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            reason = f"{row.key}: {row.reason}" if isinstance(row, Dropped) else f"item {number} is no object {{...}}"
            raise UserError(f"{path}: {reason}; an evaluation leaves no item out: mend the file or copy it again")
    if not rows:
        raise UserError(f"{path}: no item in it; give the .json or .jsonl of the benchmark")
    return ItemFile(path=path, rows=rows)


def open_pictures(images: str | Path | None, data: Path) -> PictureFolder:
    """The pictures in `images`, by default in `images` or `images.zip` beside the file of items, or in its own folder."""
    if images is not None:
        return PictureFolder(Path(images))
    beside = data if data.is_dir() else data.parent
    for place in (beside / "images", beside / "images.zip"):
        if place.exists():
            return PictureFolder(place)
    try:
        return PictureFolder(beside)
    except UserError as error:
        raise UserError(
            f"{beside}: no images/, images.zip or picture here; name the folder or .zip of the pictures with `images`"
        ) from error


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """Pairs of a picture and a text. Each picture and each text is there once, in however many pairs it is.

    Attributes:
        pictures: the pictures.
        texts: the texts.
        image_P: picture of each pair, int64 [P].
        text_P: text of each pair, int64 [P].
    """

    pictures: PictureFiles
    texts: Sequence[str]
    image_P: Tensor
    text_P: Tensor


def make_pairs(source: PictureFolder, names: Sequence[str | int], texts: Sequence[str]) -> Pairs:
    """Pairs of the picture called `names[p]` and the text `texts[p]`. Raises UserError if a picture is missing."""
    paths = {name: source.find(name) for name in dict.fromkeys(names)}
    if missing := [str(name) for name, place in paths.items() if place is None]:
        raise UserError(
            f"{source.place}: {len(missing)} of {len(paths)} pictures of the items are not here ({', '.join(missing[:3])}), "
            f"and an evaluation leaves none out; name the folder or .zip that has them with `images`"
        )
    place_of = [str(paths[name]) for name in names]
    pictures = {place: i for i, place in enumerate(dict.fromkeys(place_of))}
    distinct = {text: t for t, text in enumerate(dict.fromkeys(texts))}
    return Pairs(
        pictures=PictureFiles(source, list(pictures)),
        texts=list(distinct),
        image_P=torch.tensor([pictures[place] for place in place_of]),
        text_P=torch.tensor([distinct[text] for text in texts]),
    )
