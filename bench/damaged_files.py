"""Damages records of every format that can be imported, and files of runs, exports and shards, and counts what becomes of them.

    python -m bench.damaged_files --records 1000 --files 1000

A record that is damaged may be dropped by name; the others of its source must be imported. A file that is damaged must be
refused with a UserError, or read as what it was. Anything else is a failure, and is printed with its seed.
"""

from __future__ import annotations

import argparse
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

import torch

from bench.record_formats import FORMATS, SOURCES, Made
from fastvlp.data.records.shards import Shards
from fastvlp.data.sources.importing import import_data
from fastvlp.errors import UserError
from fastvlp.exporters.export import export
from fastvlp.model.saved_run import read_saved_run
from fastvlp.model.saving import load_model
from fastvlp.training.checkpoint import load_checkpoint
from fastvlp.training.loop import train

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
    junk = draw.choice(JUNK)
    owner[path[-1]] = junk
    return f"{path} = {repr(junk)[:40]}"


def import_all(made: Made, name: str, out: Path) -> tuple[int, int]:
    """How many records were written, and how many dropped."""
    with contextlib.redirect_stdout(io.StringIO()):
        imported = import_data(made.path, out, format=FORMATS.get(name, "auto"), progress=False)
    return sum(imported.written.values()), len(imported.dropped)


def damaged_records(count: int, seed: int = 0) -> Counter[tuple[str, str]]:
    """Imports `count` sources of which one value of one record is damaged. Counts outcomes by (format, outcome)."""
    outcomes: Counter[tuple[str, str]] = Counter()
    for n in range(count):
        make = SOURCES[n % len(SOURCES)]
        draw = random.Random(f"{seed}/{n}")
        with tempfile.TemporaryDirectory() as folder:
            made = Made(Path(folder) / "source")
            make(made)
            whole, _ = import_all(made, make.__name__, Path(folder) / "whole")
            rows, write = draw.choice(made.rows)
            what = damage_row(rows, draw)
            write()
            outcome = record_outcome(made, make.__name__, Path(folder) / "out", whole)
        outcomes[make.__name__, outcome] += 1
        if outcome.startswith("FAILED"):
            print(f"{make.__name__} {seed}/{n}: {what}: {outcome}", file=sys.stderr)
    return outcomes


def record_outcome(made: Made, name: str, out: Path, whole: int) -> str:
    # A record of NLVR is six of ours.
    most_lost = 6 if name == "nlvr" else 1
    try:
        written, dropped = import_all(made, name, out)
    except UserError as error:
        return f"FAILED: the import ended ({str(error)[-200:]})"
    except Exception as error:
        return f"FAILED: {type(error).__name__}: {str(error)[:200]}"
    if written < whole - most_lost:
        return f"FAILED: {whole - written} records lost"
    if written < whole and not dropped:
        return "FAILED: a record lost uncounted"
    return "dropped by name" if written < whole else "used"


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
        (shards, "00000.index.json", read_index),
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=1000)
    parser.add_argument("--files", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    sound = show("damaged record of", damaged_records(args.records, args.seed))
    if args.files:
        from tests.training.runs import made_pairs, made_run

        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            pairs = made_pairs(Path(folder) / "pairs", 12)
            train(made_run(pairs, Path(folder) / "run", "clip", steps=2))
            export(Path(folder) / "run", Path(folder) / "export")
            outcomes = damaged_files(
                args.files, Path(folder) / "run", Path(folder) / "export", pairs / "train", args.seed
            )
        sound &= show("damaged file", outcomes)
    sys.exit(not sound)


if __name__ == "__main__":
    main()
