"""Damages records of every format that can be imported, and files of runs, exports and shards, and counts what becomes of them.

    python bench/damaged_files.py --records 1000 --files 1000

A record is damaged in a value, or in the bytes of its image. It may be dropped by name; the others of its source must be
imported. A file that is damaged must be refused with a UserError, or read as what it was. Anything else is a failure, and is
printed with its seed. Two sections of `faults.py`.
"""

from __future__ import annotations

import contextlib
import io
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import tyro
from record_formats import SOURCES, Made

from fastvlp.data.records.shards import Shards
from fastvlp.data.sources.importing import import_data
from fastvlp.errors import UserError
from fastvlp.exporters.export import export
from fastvlp.model.saved_run import read_saved_run
from fastvlp.model.saving import load_model
from fastvlp.training.checkpoint import load_checkpoint
from fastvlp.training.loop import train
from tests.training.runs import made_pairs, made_run

# What a field may hold instead of what its format says.
JUNK: list[Any] = [
    None, "", " ", "x", "../../x", "a/b", "\ud83d", "\x00", 0, -1, 1.5, 10**30, float("nan"), float("inf"), True, [], {},
    [None], [[]], ["x", 1], {"x": {}}, {"bytes": None, "path": None}, [[[[[[["x"]]]]]]], "x" * 100_000, "http://x/y.jpg",
]  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where a value can be damaged: itself, and each value within it."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


def damage_row(rows: list[Any], draw: random.Random) -> str:
    """Replaces or removes one value within one row. Returns what was done."""
    at = draw.randrange(len(rows))
    path = (at, *draw.choice(list(places(rows[at]))))
    owner: Any = rows
    for key in path[:-1]:
        owner = owner[key]
    if isinstance(owner, dict) and draw.random() < 0.2:
        del owner[path[-1]]
        return f"without {path}"
    value = owner[path[-1]]
    if isinstance(value, bytes) and draw.random() < 0.7:
        owner[path[-1]] = damaged_bytes(value, draw)
        return f"{path}: its bytes"
    junk = draw.choice(JUNK)
    owner[path[-1]] = junk
    return f"{path} = {repr(junk)[:40]}"


def import_all(made: Made, out: Path) -> tuple[Counter[str], int]:
    """The records that were written, and how many were dropped."""
    with contextlib.redirect_stdout(io.StringIO()):
        imported = import_data(made.path, out, progress=False, **made.options)
    records = (record for split in imported.written for record in Shards(out / split))
    return Counter(repr((record.images, record.info, record.detected)) for record in records), len(imported.dropped)


def damaged_records(count: int, seed: int = 0) -> Counter[tuple[str, str]]:
    """Imports `count` sources of which one record is damaged. Counts outcomes by (format, outcome)."""
    outcomes: Counter[tuple[str, str]] = Counter()
    for n in range(count):
        make = SOURCES[n % len(SOURCES)]
        draw = random.Random(f"{seed}/{n}")
        with tempfile.TemporaryDirectory() as folder:
            made = Made(Path(folder) / "source")
            make(made)
            whole, _ = import_all(made, Path(folder) / "whole")
            rows, write = draw.choice(made.rows)
            what = damage_row(rows, draw)
            write()
            # A record of NLVR is six of ours.
            outcome = record_outcome(made, Path(folder) / "out", whole, 6 if make.__name__ == "nlvr" else 1)
        outcomes[make.__name__, outcome] += 1
        if outcome.startswith("FAILED"):
            print(f"{make.__name__} {seed}/{n}: {what}: {outcome}", file=sys.stderr)
    return outcomes


def record_outcome(made: Made, out: Path, whole: Counter[str], most_lost: int) -> str:
    """`whole`: the records of the source before it was damaged; `most_lost`: how many of them the damage may cost."""
    try:
        written, dropped = import_all(made, out)
    except UserError as error:
        return f"FAILED: the import ended ({str(error)[-200:]})"
    except Exception as error:
        return f"FAILED: {type(error).__name__}: {str(error)[:200]}"
    lost = whole.total() - written.total()
    if lost > most_lost:
        return f"FAILED: {lost} records lost"
    if lost > 0 and not dropped:
        return "FAILED: a record lost uncounted"
    # What belongs to one record may now name another one, which differs then too.
    if (changed := (whole - written).total()) > 2 * most_lost:
        return f"FAILED: {changed} records are others now"
    return "dropped by name" if lost > 0 else "used"


def damaged_bytes(data: bytes, draw: random.Random) -> bytes:
    """Data of which bits are flipped, or the end is cut, or something is added."""
    kind = draw.choice(["flip", "flip", "bytes", "cut", "longer", "hole"])
    changed = bytearray(data)
    if kind == "flip":
        bit = draw.randrange(8 * len(data))
        changed[bit // 8] ^= 1 << bit % 8
    elif kind == "bytes":
        for _ in range(32):
            changed[draw.randrange(len(data))] = draw.randrange(256)
    elif kind == "cut":
        del changed[draw.randrange(len(data)) :]
    elif kind == "longer":
        changed += draw.randbytes(draw.randrange(1, 1000))
    else:
        start = draw.randrange(len(data))
        changed[start : start + 512] = bytes(min(512, len(data) - start))
    return bytes(changed)


def signature(value: Any) -> Any:
    """Something that can be compared with ==."""
    if isinstance(value, torch.Tensor):
        return value.dtype, tuple(value.shape), value.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    if isinstance(value, dict):
        return {key: signature(inner) for key, inner in value.items()}
    return [signature(inner) for inner in value] if isinstance(value, list | tuple) else value


def read_export(folder: Path) -> Any:
    saved, run = load_model(folder), read_saved_run(folder)
    return (
        signature(dict(saved.model.state_dict())),
        saved.model.config,
        saved.info,
        saved.tokenizer.fingerprint,
        run.data,
    )


def read_index(folder: Path) -> Any:
    return [(record.key, dict(record.info), record.images) for record in Shards(folder)]


def damaged_files(count: int, run: Path, exported: Path, shards: Path, seed: int = 0) -> Counter[tuple[str, str]]:
    """Reads `count` damaged files. Counts outcomes by (file, outcome)."""
    cases: list[tuple[Path, str, Callable[[Path], Any]]] = [
        (run, "last.pt", lambda folder: signature(load_checkpoint(folder / "last.pt"))),
        (exported, "model.safetensors", read_export),
        (exported, "model.json", read_export),
        (exported, "tokenizer.json", read_export),
        (exported, "config.json", read_export),
        (shards, "index.safetensors", read_index),
    ]
    outcomes: Counter[tuple[str, str]] = Counter()
    for n in range(count):
        source, name, read = cases[n % len(cases)]
        draw = random.Random(f"{seed}/{n}")
        with tempfile.TemporaryDirectory() as place:
            folder = Path(shutil.copytree(source, Path(place) / "copy"))
            expected = read(source)
            (folder / name).write_bytes(damaged_bytes((source / name).read_bytes(), draw))
            try:
                outcome = "read as it was" if read(folder) == expected else "FAILED: read as something else"
            except UserError:
                outcome = "refused"
            except Exception as error:
                outcome = f"FAILED: {type(error).__name__}: {str(error)[:200]}"
        outcomes[name, outcome] += 1
        if outcome.startswith("FAILED"):
            print(f"{name} {seed}/{n}: {outcome}", file=sys.stderr)
    return outcomes


def show(title: str, outcomes: Counter[tuple[str, str]]) -> bool:
    """Prints a table. Returns whether nothing failed."""
    kinds = sorted({"FAILED" if outcome.startswith("FAILED") else outcome for _, outcome in outcomes})
    print(f"\n{title:20}{''.join(f'{kind:>18}' for kind in kinds)}")
    for name in dict.fromkeys(name for name, _ in outcomes):
        counts = Counter[str]()
        for (other, outcome), number in outcomes.items():
            counts["FAILED" if outcome.startswith("FAILED") else outcome] += number if other == name else 0
        print(f"{name:20}{''.join(f'{counts[kind]:>18}' for kind in kinds)}")
    return "FAILED" not in kinds


def damaged_files_of_a_run(count: int, seed: int = 0) -> Counter[tuple[str, str]]:
    """`damaged_files` of a run of two steps, its export and its shards."""
    with tempfile.TemporaryDirectory() as folder:
        pairs = made_pairs(Path(folder) / "pairs", 12)
        with contextlib.redirect_stdout(io.StringIO()):
            train(made_run(pairs, Path(folder) / "run", "clip", steps=2))
            export(Path(folder) / "run", Path(folder) / "export")
        return damaged_files(count, Path(folder) / "run", Path(folder) / "export", pairs / "train", seed)


def main(records: int = 1000, files: int = 1000, seed: int = 0) -> int:
    """Damage records and files.

    Args:
        records: Sources of which a record is damaged.
        files: Files that are damaged.
        seed: Of what is damaged.
    """
    sound = [
        show("damaged record of", damaged_records(records, seed)) if records else True,
        show("damaged file", damaged_files_of_a_run(files, seed)) if files else True,
    ]
    return int(not all(sound))


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
