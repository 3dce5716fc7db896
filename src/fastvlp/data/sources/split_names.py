"""The names that people give to splits, and those that the commands read."""

from __future__ import annotations

from typing import Any

from fastvlp.data.sources.interface import Note
from fastvlp.data.splits import SPLITS

# Karpathy's `restval`: COCO's validation images that are in no test, which everybody trains on.
USUAL = {
    "train": ("train", "training", "trainset", "train_set", "trn", "restval"),
    "val": ("val", "valid", "validation", "validate", "val_set", "valset", "eval", "evaluation"),
    "dev": ("dev", "development", "devel"),
    "test": ("test", "testing", "test_set", "testset", "tst"),
}
_SPLIT_OF = {name: split for split, names in USUAL.items() for name in names}


def usual_split(name: str) -> str:
    """The name under which a split is written: `train` for Train, TRAIN and restval; any other name is itself."""
    return _SPLIT_OF.get(name.strip().lower(), name.strip())


def split_note(named: Any, written: str) -> Note | None:
    """A note where the split that a record names is written under another name, or is one that no command looks for."""
    if named is None or str(named) == "":
        return None
    if str(named) != written:
        return Note(text=f"records of the split {named} go to {written}")
    if written not in {name for names in SPLITS.values() for name in names}:
        return Note(text=f"no command looks for the split {written} by itself; name its folder")
    return None
