"""Folders of splits, local or as fsspec URLs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import fsspec

from fastvlp.data.rows import Split
from fastvlp.errors import UserError

# Other names under which a development split is imported.
SPLITS: dict[Split, tuple[str, ...]] = {"train": ("train",), "val": ("val", "dev", "validation"), "test": ("test",)}


def find_splits(folder: str, prefixes: Sequence[str] = ("",), needed: Split = "train") -> dict[str, str]:
    """Place of each split that is there; of several prefixes of its name the first one that is. Raises UserError where the
    needed one is not."""
    found: dict[str, str] = {}
    for split, names in SPLITS.items():
        places = [place_in(folder, f"{prefix}{name}") for prefix in prefixes for name in names]
        place = next(filter(is_folder, places), None)
        if place is not None:
            found[split] = place
    if needed not in found:
        raise UserError(f"{folder}: no split called {needed} here; give the folder that `vlp data import --out` wrote")
    return found


def place_in(folder: str, name: str) -> str:
    return f"{folder.rstrip('/')}/{name}" if "://" in folder else str(Path(folder) / name)


def is_folder(place: str) -> bool:
    try:
        fs, root = fsspec.core.url_to_fs(place)
        return bool(fs.isdir(root))
    except (ImportError, ValueError, OSError) as error:
        raise UserError(f"{place}: cannot look here ({error}); check the address and your access to it") from error
