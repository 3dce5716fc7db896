"""The interface for reading records from shards, or from the files of a data set that was not imported."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

from fastvlp.batch import Dropped


class Records(Protocol):
    """Records by their number. Reading may raise RecordError."""

    def __len__(self) -> int: ...

    @property
    def url(self) -> str:
        """The path or URL of the records, for messages and results."""

    @property
    def damage(self) -> Sequence[Dropped]:
        """The parts that cannot be read, each with a name and a reason."""

    @property
    def fingerprint(self) -> str:
        """Hash that changes when the records change."""

    @property
    def folder(self) -> Path | None:
        """A local folder for files about these records; None if they are on another machine."""

    def key(self, i: int) -> str:
        """The name of record i."""

    def info(self, i: int) -> dict[str, Any]:
        """The JSON of record i."""

    def images(self, i: int) -> tuple[bytes, ...]:
        """The encoded images of record i."""

    def image_count(self, i: int) -> int:
        """Returns the number of images of record i, without reading them."""

    def detected(self, i: int) -> tuple[bytes, ...]:
        """A detector's regions of each image, as npz; empty if there are none."""


class SplitRecords(Records, Protocol):
    """The records of a whole split."""

    @property
    def content(self) -> str:
        """Hash of the records in their order, wherever they are."""

    def places(self, name: str) -> list[Path]:
        """Returns the paths at which a file about these records may be kept, best first."""

    def hold(self, records: Iterable[int]) -> None:
        """Reads whole records ahead, and keeps them until they are released as often."""

    def release(self, records: Iterable[int]) -> None:
        """Forgets records that were held, unless they are held again."""
