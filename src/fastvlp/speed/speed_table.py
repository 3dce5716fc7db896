"""Speeds as a table for people."""

from __future__ import annotations

from collections.abc import Callable

from rich.table import Table

from fastvlp.speed.measure import GIGA, Speed, Speeds

# Title -> the cell; None if nothing was measured.
COLUMNS: dict[str, Callable[[Speed], str | None]] = {
    "ms a step": lambda one: f"{one.step_s.median * 1e3:,.1f}",
    "quartiles": lambda one: f"{one.step_s.low * 1e3:,.1f} to {one.step_s.high * 1e3:,.1f}",
    "times": lambda one: f"{one.times.median:.2f}",
    "FLOPs times": lambda one: f"{one.flops_times:.2f}",
    "pairs/s": lambda one: f"{one.pairs_per_s:,.0f}",
    "tokens/s": lambda one: f"{one.tokens_per_s:,.0f}" if one.tokens_per_s else None,
    "GFLOP a step": lambda one: f"{one.flops / GIGA:,.1f}",
    "GFLOP/s": lambda one: f"{one.flops_per_s / GIGA:,.0f}",
    "floor ms": lambda one: None if one.floor_s is None else f"{one.floor_s * 1e3:,.1f}",
    "MFU": lambda one: None if one.mfu is None else f"{one.mfu:.0%}",
    "peak MB": lambda one: f"{one.memory_bytes / 1e6:,.0f}",
    "loader": lambda one: None if one.loader_share is None else f"{one.loader_share:.0%} of a step",
    "data wait": lambda one: None if one.data_wait is None else f"{one.data_wait:.0%}",
    "compile s": lambda one: None if one.compile_s is None else f"{one.compile_s:.0f}",
    "largest batch": lambda one: None if one.largest_batch is None else f"{one.largest_batch:,}",
}


def speed_table(speeds: Speeds) -> Table:
    """A row for each recipe and library; columns in which nothing was measured are left out. Rows and columns are exchanged,
    because there are more numbers than recipes."""
    about = speeds.about
    time = "CPU time of all threads" if speeds.clock == "cpu" else "time on the wall"
    table = Table(
        title=f"{about['device']}, torch {about['torch']}, {about['threads']} threads, {time}", title_justify="left"
    )
    table.add_column("")
    for one in speeds.arms:
        table.add_column(one.name, justify="right")
    table.add_row("pairs a step", *(f"{one.rows:,}" for one in speeds.arms))
    for title, cell in COLUMNS.items():
        cells = [cell(one) for one in speeds.arms]
        if any(cells):
            table.add_row(title, *(value or "-" for value in cells))
    return table
