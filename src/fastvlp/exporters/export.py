"""Exporting a run: read, written to a target's format, and compared with what was written."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from tyro.conf import arg

from fastvlp.errors import UserError, install
from fastvlp.exporters.card import card_facts
from fastvlp.exporters.interface import ExportSource, ExportTarget, find_target, formats
from fastvlp.files import whole_folder
from fastvlp.model.saved_run import read_saved_run
from fastvlp.model.saving import Which, load_model

Formats = Annotated[
    tuple[str, ...], arg(help=f"Formats to write: {formats()}. Several are written into folders of their names.")
]


class Exported(NamedTuple):
    """`card`: facts of the run. `files`: names of what was written. `differences`: how much each part that was compared differs
    from the run, by its name, which of several formats begins with the format. `url`: where it was uploaded."""

    folder: Path
    card: Mapping[str, Any]
    files: list[str]
    differences: Mapping[str, float]
    url: str | None = None


def export(
    run: Annotated[str | Path, arg(metavar="RUN")],
    out: Annotated[str | Path, arg(metavar="OUT")],
    /,
    *,
    to: Formats = ("fastvlp",),
    weights: Which = "best",
    license: str = "",
    push: str | None = None,
) -> Exported:
    """Export a run to a folder that can be used without it, in the format of this library or of others.

    Files that only training needs are left out. The exported model is compared with the run. If it differs or an error occurs,
    no folder is written.

    Args:
        run: Folder of the run.
        out: Folder to write.
        to: Formats to write. Each of several formats is written to a sub-folder of its name.
        weights: best for the weights with the lowest validation loss, or last.
        license: License of the weights, for the model card; by default the card has a placeholder.
        push: Repository on the Hugging Face hub, OWNER/NAME, to which the folder is uploaded. A new repository is private.

    Raises:
        UserError: The run cannot be exported to this format, the folder exists, or the exported model differs from the run; or
            the hub refused the upload, in which case the folder is kept.
    """
    names = [to] if isinstance(to, str) else [*dict.fromkeys(to)]
    targets, run, out = [find_target(name) for name in names], Path(run), Path(out)
    if not targets:
        raise UserError(f"`to` names no format; choose from {formats()}")
    differences: dict[str, float] = {}
    with whole_folder(out) as folder:
        saved, config = load_model(run, weights), read_saved_run(run)
        card = card_facts(saved, run, config) | {"license": license or None}
        for target in targets:
            own = "" if len(targets) == 1 else target.name
            source = ExportSource(run=run, out=out / own, saved=saved, config=config, card=card)
            own_differences = _write(target, source, folder / own)
            differences |= {f"{own} {name}".strip(): value for name, value in own_differences.items()}
        files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return Exported(out, card, files, differences, upload(out, push) if push else None)


def _write(target: ExportTarget, source: ExportSource, folder: Path) -> Mapping[str, float]:
    """Writes a format into a folder, and returns how much it differs from the run. Raises UserError as `export`."""
    if (reason := target.misfit(source)) is not None:
        raise UserError(f"{source.run}: `to` {target.name}: {reason}")
    folder.mkdir(parents=True)
    target.write(source, folder)
    if missing := [name for name in target.files if not (folder / name).is_file()]:
        raise UserError(
            f"{source.out}: the export target {target.name} did not write {', '.join(missing)}, which its `files` names"
        )
    differences = target.differences(source, folder)
    # The comparison is negated so that NaN counts as too large.
    if wrong := {name: value for name, value in differences.items() if not value <= target.tolerance}:
        too_large = ", ".join(f"{name} by {value:.3g}" for name, value in wrong.items())
        raise UserError(
            f"{source.out}: the export to {target.name} differs from the run: {too_large}, where {target.tolerance:.3g} is "
            f"allowed; nothing was kept"
        )
    return differences


def upload(folder: Path, repository: str) -> str:
    """Uploads a folder to a repository on the Hugging Face hub. If the repository is new, it is made private.

    Returns:
        The address of the repository.

    Raises:
        UserError: The extra `hub` is not installed, nobody is logged in, or the hub refused.
    """
    try:
        import huggingface_hub as hub
    except ImportError as error:
        raise UserError(f"`push` needs a package: {install('hub')}") from error
    try:
        client = hub.HfApi()
        url = str(client.create_repo(repository, private=True, exist_ok=True))
        client.upload_folder(repo_id=repository, folder_path=folder)
    except Exception as error:  # the client passes on the errors of several libraries
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"{repository}: not uploaded ({reason}); log in with `hf auth login`, and check the name. The export is complete, "
            f"in {folder}"
        ) from error
    return url
