"""Try what ends runs, imports and services, and count what survives.

    python bench/faults.py
    python bench/faults.py --sections killed_runs dead_rank --runs 8

A section tries one kind of fault:

- `killed_runs`: runs of FLM, of FLIP with gradient caching, of a momentum queue as in BriVL, and of a mix of objectives as in
  UNITER, on one rank and on two, are killed up to three times each at random moments and resumed. Then weights, averages and
  moments equal those of the uninterrupted run bit for bit.
- `full_disk`, `read_only`, `few_handles`, `dead_worker`, `dead_rank`: the run ends within 60 s with an error that names the
  cause, its checkpoint is whole, and resumed it ends as the uninterrupted one (`faulty_runs.py`).
- `damaged_records`, `damaged_files`: see `damaged_files.py`.
- `targeted_requests`, `malformed_requests`: see `hostile_requests.py`.

Prints how many were tried, survived and lost, and appends a row for each section to a file. Exits with 1 if any was lost.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faulty_runs  # first, since it keeps PyTorch from using more than one thread
import hostile_requests
import tyro
from damaged_files import damaged_files_of_a_run, damaged_records
from faulty_runs import FaultyRuns, Tally
from records import RESULTS, append, stamp
from rich.console import Console
from rich.table import Table

RUNS = ("killed_runs", "full_disk", "read_only", "few_handles", "dead_worker", "dead_rank")
DAMAGE = ("damaged_records", "damaged_files")
REQUESTS = ("targeted_requests", "malformed_requests")


@dataclass(frozen=True, kw_only=True)
class Options:
    sections: tuple[str, ...] = (*RUNS, *DAMAGE, *REQUESTS)
    """Which faults to try."""
    runs: int = 200
    """Runs that are killed."""
    records: int = 1000
    """Records that are damaged."""
    files: int = 1000
    """Files that are damaged."""
    requests: int = 10_000
    """Malformed requests."""
    seed: int = 0
    """Seed of moments, damages and requests."""
    note: str = ""
    """Other work on the machine at the same time; saved with the result."""
    out: Path = RESULTS / "faults.jsonl"
    """File to append to."""


def of_outcomes(outcomes: Counter[tuple[str, str]]) -> tuple[Tally, dict[str, Any]]:
    """`outcomes`: by (format or file, outcome)."""
    lost = [
        f"{name}: {what} ({n})" for (name, what), n in outcomes.items() if what.startswith("FAILED") for _ in range(n)
    ]
    kinds = Counter[str]()
    for (_, what), n in outcomes.items():
        kinds[what.partition(":")[0]] += n
    return Tally(tried=outcomes.total(), lost=lost), {"outcomes": dict(kinds)}


def tallies(options: Options, work: Path) -> Iterator[tuple[str, Tally, dict[str, Any]]]:
    """Tries one section after the other; yields its name, what became of it, and what else there is to say."""
    runs = FaultyRuns(work, options.runs, options.seed)
    for section in [name for name in RUNS if name in options.sections]:
        tally = Tally()
        getattr(runs, section)(tally)
        yield section, tally, {"limit_s": faulty_runs.LIMIT_S} if tally.slowest_s is not None else {}
    damage: dict[str, Callable[[], Counter[tuple[str, str]]]] = {
        "damaged_records": lambda: damaged_records(options.records, options.seed),
        "damaged_files": lambda: damaged_files_of_a_run(options.files, options.seed),
    }
    for section in [name for name in DAMAGE if name in options.sections]:
        yield section, *of_outcomes(damage[section]())
    if {*REQUESTS} & {*options.sections}:
        rows = hostile_requests.hostile_requests(options.requests, clients=16, seed=options.seed)
        hostile_requests.record(rows, "faults.py", options.note)
        for name, row in rows.items():
            tally = Tally(tried=row["tried"], lost=row["lost"])
            yield (
                name.replace(" ", "_"),
                tally,
                {key: x for key, x in row.items() if key not in ("tried", "survived", "lost")},
            )


def main(options: Options) -> int:
    """Tries the sections. Returns 1 if anything was lost."""
    if unknown := {*options.sections} - {*RUNS, *DAMAGE, *REQUESTS}:
        raise SystemExit(f"no section {sorted(unknown)[0]!r}; there are {', '.join((*RUNS, *DAMAGE, *REQUESTS))}")
    table, any_lost = Table("section", "tried", "survived", "lost", "slowest"), False
    note = {"note": options.note} if options.note else {}
    with tempfile.TemporaryDirectory() as work:
        began = time.monotonic()
        for section, tally, more in tallies(options, Path(work)):
            numbers = (tally.tried, max(0, tally.tried - len(tally.lost)), len(tally.lost))
            slowest = "" if tally.slowest_s is None else f"{tally.slowest_s:.1f} s"
            table.add_row(section, *map(str, numbers), slowest)
            row = {
                "section": section,
                **dict(zip(("tried", "survived", "lost"), numbers)),
                "seed": options.seed,
                **more,
            }
            row |= {"slowest_s": tally.slowest_s and round(tally.slowest_s, 2), "left_out": tally.left_out}
            row |= {"what_was_lost": tally.lost, "minutes": round((time.monotonic() - began) / 60, 1)}
            append(options.out, [row | stamp("cpu", "faults.py") | note])
            print(
                f"{section}: {numbers[0]} tried, {numbers[2]} lost", *tally.lost, *tally.left_out, sep="\n", flush=True
            )
            any_lost, began = any_lost or bool(tally.lost), time.monotonic()
    Console().print(table)
    return int(any_lost)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options)))
