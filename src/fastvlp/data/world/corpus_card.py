"""corpus.json: which embedded corpus a folder holds, and whether it was written to its end."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastvlp.errors import UserError
from fastvlp.files import read_plain, write_whole
from fastvlp.plain_json import parse_json


def claim(folder: Path, card: Mapping[str, Any]) -> bool:
    """Returns whether `folder` has to be written. Prepares it, and removes what an interrupted run left there."""
    path = folder / "corpus.json"
    if path.exists():
        existing = read_card(path)
        existing.pop("blind", None)
        if existing == {**card, "complete": True}:
            return False
        if existing.get("complete", True):
            raise UserError(
                f"{path}: another corpus ({existing.get('config')}, edition {existing.get('edition', 1)}) is here; delete the "
                f"folder or choose another"
            )
        for part in card["counts"]:
            for file in [*(folder / part).glob("*.tar*"), *(folder / part).glob("*index*")]:
                file.unlink()
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: the folder is not empty and has no corpus.json; choose an empty or a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    write_card(path, {**card, "complete": False})
    return True


def read_card(path: Path) -> dict[str, Any]:
    """The card of a corpus. Raises UserError if the file is no JSON object."""
    try:
        return dict(parse_json(read_plain(path)))
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: not a corpus card ({error}); delete the folder or choose another") from error


def write_card(path: Path, card: Mapping[str, Any]) -> None:
    """Writes the card, whole or not at all."""
    write_whole(path, (json.dumps(card, indent=2, ensure_ascii=False) + "\n").encode())
