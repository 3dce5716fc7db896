"""Iterators over many items: on all cores, in blocks, with a progress bar on a terminal."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

X = TypeVar("X")
Y = TypeVar("Y")


def in_threads(function: Callable[[X], Y], items: Iterable[X]) -> Iterator[Y]:
    """Maps in order on all cores, with few items in memory. For image work: Pillow releases the interpreter lock."""
    threads = os.cpu_count() or 1
    with ThreadPoolExecutor(threads) as pool:
        pending: deque[Future[Y]] = deque()
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > 4 * threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def blocks(count: int, size: int) -> Iterator[slice]:
    """Slices of `count` rows, `size` at a time."""
    return (slice(first, min(first + size, count)) for first in range(0, count, size))


def with_progress(items: Iterable[X], total: Callable[[], int | None], description: str, show: bool) -> Iterator[X]:
    """Yields `items`, with a bar where `show` is true and stderr is a terminal."""
    if not show:
        yield from items
        return
    with bar() as progress:
        yield from progress.track(items, total=None if progress.disable else total(), description=description)


def bar() -> Progress:
    """A bar on stderr with the count, the rate, the time passed and the time left; nothing if stderr is a file."""
    console = Console(stderr=True)
    shown = (
        "{task.description}",
        BarColumn(),
        MofNCompleteColumn(),
        _Rate(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*shown, console=console, disable=not console.is_terminal)


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.finished_speed or task.speed or 0:.0f}/s")
