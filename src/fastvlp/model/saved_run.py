"""The parts of a run's config.json that are needed to use its model: the preprocessing of images and texts, and the folders
of its data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from fastvlp.config import from_json
from fastvlp.data.records.transform import Fit
from fastvlp.data.regions import RegionSource
from fastvlp.data.state_store import StatesConfig
from fastvlp.dist import Precision
from fastvlp.errors import UserError
from fastvlp.plain_json import check_sum, read_strict_json

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class SavedData:
    """The part of a run's data config that is read later; defaults where the config does not state it.

    Attributes:
        train, val, test: folders of the splits.
        fit: how an image became a square.
        max_length: number of tokens after which a text was cut.
        captions: field of the records with the captions.
        regions: source of the regions; None if the model read none.
        answers: the answers among which a model that answers questions chooses.
        stated: names of the fields that the config states.
    """

    train: str | None = None
    val: str | None = None
    test: str | None = None
    batch_size: int | None = None
    fit: Fit = "crop"
    max_length: int = 50
    captions: str = "captions"
    regions: RegionSource | None = None
    answers: tuple[str, ...] = ()
    stated: frozenset[str] = frozenset()

    @property
    def folders(self) -> dict[str, str]:
        """Returns the folders of the splits that exist, by split."""
        named = {"train": self.train, "val": self.val, "test": self.test}
        return {split: folder for split, folder in named.items() if folder}


@dataclass(frozen=True, kw_only=True)
class SavedRun:
    """The part of a run's config that is read later. `data_json`: the whole data config, of any type. `states`: how the states
    of frozen encoders were stored."""

    path: Path
    name: str | None = None
    precision: Precision = "fp32"
    data: SavedData = field(default_factory=SavedData)
    data_json: Mapping[str, Any] = field(default_factory=dict)
    states: StatesConfig = field(default_factory=StatesConfig)

    def data_as(self, cls: type[T]) -> T:
        """Returns the data config as an instance of the run's type. Raises UserError if it has another type."""
        return from_json(cls, self.data_json, f"{self.path}, data")


def read_saved_run(folder: str | Path) -> SavedRun:
    """Reads the config of a saved run; returns the defaults if a model was saved without a config. Raises UserError if the
    file is damaged."""
    path, config = Path(folder) / "config.json", whole_config(folder)
    data = config.get("data", {})
    if not isinstance(data, dict):
        raise UserError(f"{path}: damaged, data is {data!r}; copy the folder again")
    names = {field.name for field in fields(SavedData)} - {"stated"}
    stated = {name: value for name, value in data.items() if name in names and value is not None}
    head = {name: config[name] for name in ("name", "precision", "states") if config.get(name) is not None}
    return from_json(
        SavedRun,
        head | {"path": str(path), "data": stated | {"stated": list(stated)}, "data_json": data},
        str(path),
    )


def whole_config(folder: str | Path) -> dict[str, Any]:
    """Reads all fields of the config of a saved run, as JSON; empty if there is none. Raises UserError if the file is
    damaged."""
    return read_json(Path(folder) / "config.json")


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object; empty if there is no such file. Raises UserError if the file is damaged."""
    try:
        return check_sum(read_strict_json(path)) if path.exists() else {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: damaged ({error}); copy the folder again, or remove the file") from error
