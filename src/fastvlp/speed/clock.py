"""Time of steps that take turns, so that other work on the machine affects all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import torch

T = TypeVar("T")


class Lap(NamedTuple):
    """Seconds of the processor, all threads of this process together, and seconds on the wall."""

    cpu_s: float
    wall_s: float


class Clock:
    """Measures the time since it was made. A GPU finishes its work first."""

    def __init__(self, device: torch.device):
        self.device = device
        self._start = self._now()

    def _now(self) -> tuple[float, float]:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.process_time(), time.perf_counter()

    def read(self) -> Lap:
        cpu, wall = self._now()
        return Lap(cpu - self._start[0], wall - self._start[1])


def seconds(lap: Lap, device: torch.device) -> float:
    """Returns the time that counts on a device: CPU time on a CPU, since wall time would include other programs; else wall
    time."""
    return lap.cpu_s if device.type == "cpu" else lap.wall_s


class Quartiles(NamedTuple):
    """The quarter, the middle and the three quarters of a list of numbers in their order."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Quartiles:
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        return cls(*statistics.quantiles(values, n=4, method="inclusive"))


def in_turn(names: Sequence[str], repetitions: int, run: Callable[[str], T]) -> dict[str, list[T]]:
    """Calls `run` with each name, so many times, in alternating order. Returns the results of each name in their order."""
    results: dict[str, list[T]] = {name: [] for name in names}
    for number in range(repetitions):
        for name in names[:: -1 if number % 2 else 1]:
            results[name].append(run(name))
    return results


def ratio(over: Sequence[float], under: Sequence[float]) -> Quartiles:
    """The quartiles of the ratios of neighbours."""
    return Quartiles.of([a / b for a, b in zip(over, under)])
