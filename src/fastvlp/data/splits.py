"""Finds the folders of splits, local or as fsspec URLs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fastvlp.data.pairs import Split
from fastvlp.data.records.remote import FIRST_WAITS, attempt, is_url, open_url
from fastvlp.errors import UserError

# Names of each split's folder. RefCOCO's testA and testB are not among them, since each is half of a test split.
SPLITS = {"train": ("train",), "val": ("val", "dev", "validation"), "test": ("test", "test1")}


def find_splits(folder: str, prefixes: Sequence[str] = ("",), needed: Split = "train") -> dict[str, str]:
    """The folder of each split that is there. Raises UserError if the needed one is missing."""
    places = {split: place for split in SPLITS if (place := _find(folder, split, prefixes)) is not None}
    return places if needed in places else places | {needed: find_split(folder, needed, prefixes)}


def find_split(folder: str, name: str, prefixes: Sequence[str] = ("",)) -> str:
    """Returns the folder of a split, under any of the split's names, and with the first prefix for which a folder exists.
    Raises UserError if there is none."""
    if (place := _find(folder, name, prefixes)) is None:
        if not is_url(folder) and not Path(folder).exists():
            raise UserError(f"{folder}: there is no such folder; give the one that `vlp data import --out` wrote")
        raise UserError(f"{folder}: no split called {name} here; give the folder that `vlp data import --out` wrote")
    return place


def _find(folder: str, name: str, prefixes: Sequence[str]) -> str | None:
    names = SPLITS.get(name, (name,))
    return next(filter(is_folder, (place_in(folder, prefix + one) for prefix in prefixes for one in names)), None)


def place_in(folder: str, name: str) -> str:
    """Returns the path or URL of `name` in a folder."""
    return f"{folder.rstrip('/')}/{name}" if "://" in folder else str(Path(folder) / name)


def parent(place: str) -> str:
    """Returns the folder that contains a path or URL."""
    return place.rstrip("/").rpartition("/")[0] if "://" in place else str(Path(place).parent)


def is_folder(place: str) -> bool:
    """Whether a path or URL is a folder. Raises UserError if it cannot be accessed."""
    fs, root = open_url(place)
    return attempt(place, lambda: bool(fs.isdir(root)), FIRST_WAITS if is_url(place) else ())
