"""Folders that the `datasets` library writes with `save_to_disk`: Arrow files, `state.json`, `dataset_info.json`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fastvlp.batch import Dropped
from fastvlp.data.sources.columnar import read_arrow
from fastvlp.data.sources.delimited import Row
from fastvlp.data.sources.interface import Match, Note
from fastvlp.data.sources.row_source import RowSource, Table
from fastvlp.data.sources.source_files import read_json
from fastvlp.errors import UserError

STATE, SPLITS = "state.json", "dataset_dict.json"


@dataclass(frozen=True, kw_only=True)
class SavedDatasetSource(RowSource):
    """A data set of the `datasets` library, or one for each split."""

    name = "saved_dataset"
    summary = "a folder that the `datasets` library wrote with save_to_disk"

    @classmethod
    def match(cls, path: Path) -> Match:
        return Match.NAMES if (path / SPLITS).is_file() or _is_saved(path) else Match.NONE

    def tables(self, path: Path) -> Iterator[Table]:
        folders = [path] if _is_saved(path) else sorted(file.parent for file in path.glob(f"*/{STATE}"))
        if not folders:
            raise UserError(f"{path}: no {STATE} is here or in its folders, as the `datasets` library writes it")
        for folder in folders:
            state = read_json(folder / STATE)
            listed = state.get("_data_files") or [] if isinstance(state, dict) else []
            files = [folder / str(one.get("filename")) for one in listed if isinstance(one, dict)]
            split = folder.name if folder != path else str(state.get("_split") or "") if isinstance(state, dict) else ""
            for file in files or sorted(folder.glob("*.arrow")):
                if file.parent != folder or not file.is_file():
                    missing = Note(text="Arrow files that state.json lists and that are missing", example=file.name)
                    yield Table(path=file, rows=_only(missing), split=split)
                    continue
                rows, names = read_arrow(file)
                yield Table(path=file, rows=rows, split=split, class_names=names)


def _is_saved(path: Path) -> bool:
    return (path / STATE).is_file() and (path / "dataset_info.json").is_file()


def _only(note: Note) -> Iterator[Row | Dropped | Note]:
    yield note
