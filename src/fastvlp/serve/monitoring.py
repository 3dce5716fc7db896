"""Counts and durations of the service for Prometheus."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from fastvlp.serve.batcher import BatchRun

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics(Collector):
    """The metrics that /metrics shows."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self._gauges: dict[str, float] = {}
        self.requests = Histogram(
            "fastvlp_request_seconds",
            "Time of requests by route and status.",
            ("route", "status"),
            buckets=SECONDS,
            registry=registry,
        )
        self.rows = Histogram("fastvlp_batch_rows", "Inputs of a batch.", ("kind",), buckets=ROWS, registry=registry)
        self.seconds = Histogram(
            "fastvlp_batch_seconds", "Time of the model for a batch.", ("kind",), buckets=SECONDS, registry=registry
        )
        self.waits = Histogram(
            "fastvlp_batch_wait_seconds",
            "Time that a batch's oldest input waited.",
            ("kind",),
            buckets=SECONDS,
            registry=registry,
        )
        registry.register(self)

    def request(self, route: str, status: int, seconds: float) -> None:
        """Counts a request that was answered."""
        self.requests.labels(route=route, status=str(status)).observe(seconds)

    def batch(self, batch: BatchRun) -> None:
        """Counts a batch that was run."""
        self.rows.labels(kind=batch.lane).observe(batch.rows)
        self.seconds.labels(kind=batch.lane).observe(batch.seconds)
        self.waits.labels(kind=batch.lane).observe(batch.waited_s)

    def text(self, **gauges: float) -> bytes:
        """Returns all of it in Prometheus' text format. `gauges`: what is measured at this moment, by name."""
        self._gauges = gauges
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """Yields what is measured when somebody asks. Called by the registry."""
        for name, value in {**self._gauges, "resident_memory_bytes": resident_bytes()}.items():
            yield GaugeMetricFamily(f"fastvlp_{name}", name.replace("_", " "), value)
        yield CounterMetricFamily("fastvlp_cpu_seconds", "processor time", time.process_time())


def resident_bytes() -> int:
    """Returns the memory of this process; 0 where the system does not say."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmRSS:"))
