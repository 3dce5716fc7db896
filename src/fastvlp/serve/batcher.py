"""Batches of inputs from many requests: those that come at about the same time, and are of about the same length."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from fastvlp.serve.limits import Refusal


class InputError(Exception):
    """Raised by a lane's `run` for one row of its batch. `reason` is for its sender."""

    def __init__(self, row: int, reason: str):
        super().__init__(row, reason)
        self.row, self.reason = row, reason


@dataclass(frozen=True, kw_only=True)
class Lane:
    """One kind of work.

    Attributes:
        run: Returns an output for each input of a batch.
        budget: The most that the number of inputs times the length of the longest may be.
    """

    run: Callable[[list[Any]], Iterable[Any]]
    budget: int


@dataclass(frozen=True)
class BatchRun:
    """A batch that was run, for the metrics. `waited_s`: how long its oldest input waited. `seconds`: how long it ran."""

    lane: str
    rows: int
    waited_s: float
    seconds: float


@dataclass(eq=False)
class _Job:
    lane: str
    item: Any
    length: int
    future: asyncio.Future[Any]
    loop: asyncio.AbstractEventLoop
    since: float

    def settle(self, result: Any = None, error: Exception | None = None) -> None:
        def settle() -> None:
            if self.future.done():
                return  # the client has left
            if error is not None:
                self.future.set_exception(error)
            else:
                self.future.set_result(result)

        with suppress(RuntimeError):  # the loop was closed while the model ran
            self.loop.call_soon_threadsafe(settle)


def choose_rows(lengths: Sequence[int], budget: int) -> list[int]:
    """Chooses the rows that share a batch with row 0: its neighbours in length, the nearest first.

    The number of rows times the longest stays within the budget, but for row 0 alone, which is always chosen. Of equal lengths
    the first come first.
    """
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    low = high = order.index(0)
    while True:
        rows = high - low + 2
        below = lengths[order[low]] - lengths[order[low - 1]] if low else None
        above = lengths[order[high + 1]] - lengths[order[high]] if high + 1 < len(order) else None
        if below is not None and rows * lengths[order[high]] > budget:
            below = None
        if above is not None and rows * lengths[order[high + 1]] > budget:
            above = None
        if below is None and above is None:
            return sorted(order[low : high + 1])
        if above is None or (below is not None and below <= above):
            low -= 1
        else:
            high += 1


class Batcher:
    """One thread that runs all batches. Event loops submit inputs to it.

    A batch starts when its oldest input has waited `window_s`, or when it is full; an input that came while the model was
    busy has waited long enough. If the last batch of its lane was of one request, the next starts at once: inputs that come
    meanwhile share the batch after it, and from then on it is worth to wait.

    Args:
        lanes: Kinds of work by name.
        window_s: How long an input waits for others.
        max_waiting: How many inputs may wait.
        on_batch: Called after every batch, in the thread.
    """

    def __init__(
        self,
        lanes: Mapping[str, Lane],
        *,
        window_s: float = 0.003,
        max_waiting: int = 512,
        on_batch: Callable[[BatchRun], None] = lambda batch: None,
    ):
        self.lanes, self.window_s, self.max_waiting, self.on_batch = lanes, window_s, max_waiting, on_batch
        self._jobs: list[_Job] = []
        self._shared: dict[str, bool] = {}  # whether a lane's last batch was of several requests
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="model", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """The number of inputs that a client still waits for."""
        return sum(not job.future.cancelled() for job in [*self._jobs])

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    async def submit(self, lane: str, items: Sequence[Any], lengths: Sequence[int] | None = None) -> list[Any]:
        """Returns an output for each item. When it is cancelled, items that have not begun are taken back.

        Raises:
            Refusal: Too many inputs wait already, or the service is stopping (503).
            InputError: An item cannot be used; its `row` counts among these items.
        """
        loop, now, lengths = asyncio.get_running_loop(), time.monotonic(), lengths or [1] * len(items)
        jobs = [_Job(lane, item, n, loop.create_future(), loop, now) for item, n in zip(items, lengths)]
        with self._changed:
            if self._closed:
                raise Refusal(503, "stopping", "the service is stopping", retry_s=5)
            if self.waiting + len(jobs) > self.max_waiting:
                raise Refusal(503, "busy", f"{self.waiting} inputs wait for the model already", retry_s=1)
            self._jobs += jobs
            self._changed.notify()
        try:
            return list(await asyncio.gather(*(job.future for job in jobs)))
        except InputError as bad:
            row = next(i for i, job in enumerate(jobs) if job.future.done() and job.future.exception() is bad)
            raise InputError(row, bad.reason) from bad
        finally:
            for job in jobs:
                job.future.cancel()

    def close(self) -> None:
        """Ends the thread after its present batch. Inputs that wait are refused."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _work(self) -> None:
        while (batch := self._next()) is not None:
            began = time.monotonic()
            self._run(batch)
            waited = began - min(job.since for job in batch)
            self.on_batch(BatchRun(batch[0].lane, len(batch), waited, time.monotonic() - began))

    def _next(self) -> list[_Job] | None:
        """Waits for the next batch, and takes its jobs out of those that wait. Returns None when closed."""
        with self._changed:
            while not self._closed:
                self._jobs = [job for job in self._jobs if not job.future.cancelled()]
                if not self._jobs:
                    self._changed.wait()
                    continue
                oldest = self._jobs[0]
                alike = [job for job in self._jobs if job.lane == oldest.lane]
                chosen = choose_rows([job.length for job in alike], self.lanes[oldest.lane].budget)
                window_s = self.window_s if self._shared.get(oldest.lane) else 0.0
                left_s = oldest.since + window_s - time.monotonic()
                if left_s > 0 and len(chosen) == len(alike):
                    self._changed.wait(left_s)
                    continue
                batch = [alike[i] for i in chosen]
                self._shared[oldest.lane] = len({job.since for job in batch}) > 1
                taken = {id(job) for job in batch}
                self._jobs = [job for job in self._jobs if id(job) not in taken]
                return batch
            for job in self._jobs:
                job.settle(error=Refusal(503, "stopping", "the service is stopping", retry_s=5))
            self._jobs = []
            return None

    def _run(self, batch: list[_Job]) -> None:
        while batch:
            try:
                results = self.lanes[batch[0].lane].run([job.item for job in batch])
            except InputError as bad:
                # The others are run again without it.
                batch.pop(bad.row).settle(error=bad)
            except Exception as error:
                for job in batch:
                    job.settle(error=error)
                return
            else:
                for job, result in zip(batch, results, strict=True):
                    job.settle(result)
                return
