"""Counts and durations in Prometheus' text format: a dozen numbers need no client library."""

from __future__ import annotations

import threading
import time
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from fastvlp.serve.batcher import Ran

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
Labels = tuple[tuple[str, str], ...]


class Histogram:
    """Observations by their labels, counted in buckets that include their upper bound."""

    def __init__(self, name: str, about: str, bounds: Sequence[float]):
        self.name, self.about, self.bounds = name, about, bounds
        self._counts: dict[Labels, list[int]] = defaultdict(lambda: [0] * (len(bounds) + 1))
        self._totals: dict[Labels, float] = defaultdict(float)
        self._lock = threading.Lock()

    def observe(self, value: float, **labels: str) -> None:
        key = tuple(sorted(labels.items()))
        with self._lock:
            self._counts[key][bisect_left(self.bounds, value)] += 1
            self._totals[key] += value

    def lines(self) -> list[str]:
        with self._lock:
            counts, totals = {key: [*row] for key, row in self._counts.items()}, {**self._totals}
        lines = [f"# HELP {self.name} {self.about}", f"# TYPE {self.name} histogram"]
        for key, row in counts.items():
            so_far = 0
            for bound, count in zip([*map(str, self.bounds), "+Inf"], row):
                so_far += count
                lines.append(f"{self.name}_bucket{_labels((*key, ('le', bound)))} {so_far}")
            lines.append(f"{self.name}_sum{_labels(key)} {totals[key]:.6f}")
            lines.append(f"{self.name}_count{_labels(key)} {so_far}")
        return lines


class Metrics:
    """What /metrics shows."""

    def __init__(self) -> None:
        self.requests = Histogram("fastvlp_request_seconds", "Time of requests by route and status.", SECONDS)
        self.rows = Histogram("fastvlp_batch_rows", "Inputs of a batch.", ROWS)
        self.ran = Histogram("fastvlp_batch_seconds", "Time of the model for a batch.", SECONDS)
        self.waited = Histogram("fastvlp_batch_wait_seconds", "Time that a batch's oldest input waited.", SECONDS)

    def batch(self, ran: Ran) -> None:
        self.rows.observe(ran.rows, kind=ran.lane)
        self.ran.observe(ran.took_s, kind=ran.lane)
        self.waited.observe(ran.waited_s, kind=ran.lane)

    def text(self, **gauges: float) -> str:
        """`gauges`: what is measured when it is asked for."""
        lines = [line for part in (self.requests, self.rows, self.ran, self.waited) for line in part.lines()]
        for name, value in {**gauges, "resident_memory_bytes": resident_bytes()}.items():
            lines += [f"# TYPE fastvlp_{name} gauge", f"fastvlp_{name} {value}"]
        lines += ["# TYPE fastvlp_cpu_seconds_total counter", f"fastvlp_cpu_seconds_total {time.process_time():.3f}"]
        return "\n".join(lines) + "\n"


def resident_bytes() -> int:
    """Of this process; 0 where the system does not say."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmRSS:"))


def _labels(pairs: Labels) -> str:
    def quoted(value: str) -> str:
        return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")

    return "{" + ",".join(f'{name}="{quoted(value)}"' for name, value in pairs) + "}" if pairs else ""
