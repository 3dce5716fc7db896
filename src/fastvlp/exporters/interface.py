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
        out: Folder of the finished export. While it is written, the files are in a temporary folder beside it.
        saved: The model in evaluation mode on the CPU, its tokenizer, information on its training, and saved parameters of its
            objectives.
        config: How the run preprocessed images and texts.
        card: Facts about the run, as JSON (`exporters.card`).
    """

    run: Path
    out: Path
    saved: Saved
    config: SavedRun
    card: Mapping[str, Any]

    @property
    def place(self) -> str:
        """The folder as it is written in examples of the card: without an absolute path, which would describe this machine."""
        return self.out.name if self.out.is_absolute() else self.out.as_posix()

    @property
    def license(self) -> str:
        """The licence for the front matter of a card."""
        return self.card["license"] or "other"

    @property
    def max_length(self) -> int:
        """The largest number of tokens of a text, including <s> and </s>."""
        return min(self.config.data.max_length, self.saved.model.config.longest_text)


class ExportTarget(ABC):
    """A format that runs are exported to.

    `export` calls `misfit`, then `write`, then `differences`. If one of them fails, it removes the written files.

    Attributes:
        name: Name of the format, the value of `to`.
        summary: A line for the help that names the tools that read the format.
        files: Names of the files that every export has.
        tolerance: Largest difference at which an export counts as equal to the run.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    files: ClassVar[tuple[str, ...]]
    tolerance: ClassVar[float] = 0.0

    @abstractmethod
    def misfit(self, source: ExportSource) -> str | None:
        """Returns the reason why the run cannot be exported to this format, and which runs can; None if it can."""

    @abstractmethod
    def write(self, source: ExportSource, folder: Path) -> None:
        """Writes the files into an empty folder."""

    @abstractmethod
    def differences(self, source: ExportSource, folder: Path) -> Mapping[str, float]:
        """Reads the written files and compares them with the run.

        Returns:
            The largest difference of each part that is compared, by the name of the part, such as `parameters`.
        """


def targets() -> dict[str, type[ExportTarget]]:
    """Returns, by name, the targets of this package and of files that the user imported."""
    return {target.name: target for target in variants(ExportTarget, PACKAGE)}


def formats() -> str:
    """Describes all targets."""
    return ", ".join(f"{name} ({target.summary})" for name, target in sorted(targets().items()))


def find_target(name: str) -> ExportTarget:
    """Returns the target of this name. Raises UserError if there is none."""
    known = targets()
    if name not in known:
        raise UserError(
            f"`to` {name}: no export target of that name; choose from {', '.join(sorted(known))}. Import your own target with "
            f"`vlp --import FILE.py export ...`"
        )
    return known[name]()


def largest_difference(written: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> float:
    """Returns the largest difference between two sets of tensors; infinity if their names or shapes differ."""
    if written.keys() != wanted.keys() or any(written[name].shape != wanted[name].shape for name in wanted):
        return float("inf")
    pairs = [(written[name].double(), wanted[name].double()) for name in wanted if wanted[name].numel()]
    return max((float(torch.max(torch.abs(one - other))) for one, other in pairs), default=0.0)
