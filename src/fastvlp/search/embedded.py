"""The folder that `vlp embed` writes: unit vectors of shards, as files that a search engine, or numpy, can read.

A part is a file of some records: `image` [n E], `text` [t E] and `image_of_text` [t] as safetensors, and in its metadata the
records, the texts, and the records that were dropped. `embedded.json` says what all parts have in common.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from fastvlp.batch import Dropped
from fastvlp.errors import UserError
from fastvlp.files import read_plain, write_whole
from fastvlp.plain_json import parse_json
from fastvlp.search.checks import Scalar
from fastvlp.search.engines.interface import Stamp

PLAN, DROPPED = "embedded.json", "dropped.jsonl"


class Part(NamedTuple):
    """Vectors of some records.

    Attributes:
        ids: Keys of the records.
        positions: Of the records in their shards.
        infos: Captions, label and source of each record.
        image: Vectors of the images, float32 [n E].
        captions: Texts of all records, one after the other.
        text: Their vectors, float32 [t E].
        image_of_text: Which row of `image` each text belongs to, int64 [t].
        dropped: Records that could not be read.
    """

    ids: list[str]
    positions: list[int]
    infos: list[dict[str, Scalar]]
    image: np.ndarray
    captions: list[str]
    text: np.ndarray
    image_of_text: np.ndarray
    dropped: list[Dropped]


class EmbeddedFolder(NamedTuple):
    """A whole folder. `stamp`: of the model. `data`: the address of the shards. `parts`: files, in the order of the shards."""

    folder: Path
    stamp: Stamp
    data: str
    parts: list[Path]


def part_file(folder: Path, number: int) -> Path:
    """Returns where a part is, or will be."""
    return folder / f"{number:05d}.safetensors"


def part_bytes(part: Part) -> bytes:
    """Returns what `read_part` reads."""
    records = [
        {"id": id, "place": position, "info": info} for id, position, info in zip(part.ids, part.positions, part.infos)
    ]
    dropped = [{"key": record.key, "reason": record.reason} for record in part.dropped]
    metadata = {"records": records, "texts": part.captions, "dropped": dropped}
    tensors = {"image": part.image, "text": part.text, "image_of_text": part.image_of_text}
    # One entry: several would be written in another order each time.
    return save(tensors, metadata={"part": json.dumps(metadata, ensure_ascii=False)})


def read_part(path: Path) -> Part:
    """Raises UserError if the file is damaged."""
    try:
        with safe_open(path, "np") as file:
            metadata = parse_json(file.metadata()["part"])
            image, text, image_of_text = (file.get_tensor(name) for name in ("image", "text", "image_of_text"))
        records = metadata["records"]
        return Part(
            ids=[record["id"] for record in records],
            positions=[record["place"] for record in records],
            infos=[record["info"] for record in records],
            image=image,
            captions=metadata["texts"],
            text=text,
            image_of_text=image_of_text,
            dropped=[Dropped(**record) for record in metadata["dropped"]],
        )
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: damaged ({error}); remove it and run `vlp embed` again") from error


def write_plan(path: Path, plan: Mapping[str, Any]) -> None:
    """Writes what the parts of a folder have in common, or checks that it is written there already.

    Raises:
        UserError: The folder holds parts of another run, or other files of that kind.
    """
    if not path.exists():
        if any(path.parent.glob("*.safetensors")):
            raise UserError(f"{path.parent}: holds safetensors that `vlp embed` did not write; choose another folder")
        write_whole(path, json.dumps(plan, indent=2, ensure_ascii=False).encode())
        return
    written = _read_plan(path)
    # Shards may have been moved; their keys tell whether they are the same.
    changed = {name for name in plan if written.get(name) != plan[name]} - {"data"}
    if changed:
        changes = "; ".join(f"{name}: {written.get(name)} then, {plan[name]} now" for name in sorted(changed))
        raise UserError(
            f"{path.parent}: holds parts of another run ({changes}); continue with the same options, or choose another "
            f"folder"
        )


def _read_plan(path: Path) -> dict[str, Any]:
    try:
        plan = parse_json(read_plain(path))
    except FileNotFoundError as error:
        raise UserError(f"{path.parent}: not a folder that `vlp embed` wrote, it has no {path.name}") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); give a folder that `vlp embed` wrote") from error
    return plan if isinstance(plan, dict) else {}


def open_embedded(folder: Path) -> EmbeddedFolder:
    """Raises UserError if `vlp embed` did not write the folder, and where a part is missing: the run was stopped."""
    plan = _read_plan(folder / PLAN)
    try:
        count = -(-plan["records"] // plan["per_part"])
        parts = [part_file(folder, number) for number in range(count)]
        embedded = EmbeddedFolder(folder, Stamp(**plan["stamp"]), plan["data"], parts)
    except (KeyError, TypeError) as error:
        raise UserError(f"{folder / PLAN}: damaged ({error!r}); run `vlp embed` again, into another folder") from error
    if missing := [path.name for path in parts if not path.exists()]:
        raise UserError(
            f"{folder}: {len(missing)} of {count} parts are not there yet ({missing[0]} ...); run `vlp embed` again"
        )
    return embedded


def write_dropped(path: Path, dropped: Iterable[Dropped]) -> None:
    """Writes a line of JSON for each record that is in no part."""
    lines = [json.dumps({"key": one.key, "reason": one.reason}, ensure_ascii=False) + "\n" for one in dropped]
    write_whole(path, "".join(lines).encode())


def read_dropped(path: Path) -> list[Dropped]:
    """Reads what `write_dropped` wrote. Raises UserError if it is missing: the run was stopped just before its end."""
    try:
        return [Dropped(**parse_json(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); run `vlp embed` again, which writes it") from error
