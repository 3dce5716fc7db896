"""Exporting a run: read, written to a target's format, and compared with what was written."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from tyro.conf import arg

from fastvlp.errors import UserError
from fastvlp.exporters.card import card_facts
from fastvlp.exporters.interface import ExportSource, find_target, formats
from fastvlp.files import whole_folder
from fastvlp.model.saved_run import read_saved_run
from fastvlp.model.saving import Which, load_model

Format = Annotated[str, arg(help=f"Format to write: {formats()}.")]


class Exported(NamedTuple):
    """`card`: facts of the run. `files`: names of what was written. `differences`: how much each part that was compared differs
    from the run."""

    folder: Path
    card: Mapping[str, Any]
    files: list[str]
    differences: Mapping[str, float]


def export(
    run: str | Path, out: str | Path, /, *, to: Format = "fastvlp", weights: Which = "best", license: str = ""
) -> Exported:
    """Make of a run a folder that stands alone, in a format of this library or of another one.

    What training alone needs is left out. What was written is compared with the run; the folder is there whole or not at all.

    Args:
        run: Folder of the run.
        out: Folder to write.
        to: Format to write.
        weights: Those of the lowest validation loss, or the last ones.
        license: Of the weights, for the card; a placeholder stands where none is given.

    Raises:
        UserError: The run cannot be exported to this format, something is in the way, or what was written differs from the run.
    """
    target, run, out = find_target(to), Path(run), Path(out)
    with whole_folder(out) as folder:
        saved, config = load_model(run, weights), read_saved_run(run)
        card = card_facts(saved, run, config) | {"license": license or None}
        source = ExportSource(run=run, out=out, saved=saved, config=config, card=card)
        if (reason := target.misfit(source)) is not None:
            raise UserError(f"{run}: {reason}")
        folder.mkdir(parents=True)
        target.write(source, folder)
        if missing := [name for name in target.files if not (folder / name).is_file()]:
            raise UserError(f"{out}: the target {to} did not write {', '.join(missing)}, which its `files` names")
        differences = target.differences(source, folder)
        # Written so that a difference that is no number is too large as well.
        if wrong := {name: value for name, value in differences.items() if not value <= target.tolerance}:
            found = ", ".join(f"{name} by {value:.3g}" for name, value in wrong.items())
            raise UserError(
                f"{out}: what was written as {to} differs from the run: {found}, where {target.tolerance:.3g} is allowed; "
                f"nothing was kept"
            )
        files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return Exported(out, card, files, differences)
