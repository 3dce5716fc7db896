"""The interface of export targets. A target is a class derived from `ExportTarget`, here or in a user's own file."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastvlp.errors import UserError
from fastvlp.extensions import variants
from fastvlp.model.saved_run import SavedRun
from fastvlp.model.saving import Saved

PACKAGE = "fastvlp.exporters"


@dataclass(frozen=True, kw_only=True)
class ExportSource:
    """A run to export.

    Attributes:
        run: Folder of the run.
        out: Folder that the export will be in; until it is whole, it is written beside it.
        saved: The model in evaluation mode on the CPU, its tokenizer, what is known of its training, and what its objectives
            learned.
        config: How the run read images and texts.
        card: Facts of the run, as JSON (`exporters.card`).
    """

    run: Path
    out: Path
    saved: Saved
    config: SavedRun
    card: Mapping[str, Any]

    @property
    def place(self) -> str:
        """The folder for examples in a card: an absolute path says something about the machine."""
        return self.out.name if self.out.is_absolute() else self.out.as_posix()

    @property
    def license(self) -> str:
        """The licence for the front matter of a card."""
        return self.card["license"] or "other"

    @property
    def max_length(self) -> int:
        """The most tokens of a text, <s> and </s> included."""
        return min(self.config.data.max_length, self.saved.model.config.longest_text)


class ExportTarget(ABC):
    """A format that runs are exported to.

    `export` calls `misfit`, then `write`, then `differences`, and removes what was written where one of them fails.

    Attributes:
        name: The value of `to`.
        summary: What reads the format, for help.
        files: Names of files that every export has.
        tolerance: The largest difference at which an export counts as equal to the run.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    files: ClassVar[tuple[str, ...]]
    tolerance: ClassVar[float] = 0.0

    @abstractmethod
    def misfit(self, source: ExportSource) -> str | None:
        """Says why a run cannot be exported to this format, and what can; None where it can."""

    @abstractmethod
    def write(self, source: ExportSource, folder: Path) -> None:
        """Writes the files into a folder, which is empty."""

    @abstractmethod
    def differences(self, source: ExportSource, folder: Path) -> Mapping[str, float]:
        """Reads what was written, and compares it with the run.

        Returns:
            For everything that is compared its name, such as `parameters` or `image vectors`, and the largest difference.
        """


def targets() -> dict[str, type[ExportTarget]]:
    """Lists, by name, the targets of this package and those of files that the user imported."""
    return {target.name: target for target in variants(ExportTarget, PACKAGE)}


def formats() -> str:
    """Describes all targets."""
    return ", ".join(f"{name} ({target.summary})" for name, target in sorted(targets().items()))


def find_target(name: str) -> ExportTarget:
    """Raises UserError where there is no target of that name."""
    known = targets()
    if name not in known:
        raise UserError(
            f"`to` {name}: no export target of that name; there are {', '.join(sorted(known))}. For a target of your own: "
            f"`vlp --import FILE.py export ...`"
        )
    return known[name]()


def largest_difference(written: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> float:
    """Returns the largest difference of two sets of tensors; infinity where their names or shapes differ."""
    if written.keys() != wanted.keys() or any(written[name].shape != wanted[name].shape for name in wanted):
        return float("inf")
    pairs = [(written[name].double(), wanted[name].double()) for name in wanted if wanted[name].numel()]
    return max((float(torch.max(torch.abs(one - other))) for one, other in pairs), default=0.0)
