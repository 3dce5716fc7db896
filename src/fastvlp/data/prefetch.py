"""A thread that takes items from an iterator ahead of their use, so that decoding overlaps with computing."""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class _End:
    """Marks the end of the source, or the error that it raised."""

    def __init__(self, error: BaseException | None = None):
        self.error = error


class Prefetch(Iterator[T], Generic[T]):
    """Yields the items of `source`; up to `depth` items are made ahead. An exception of the source is raised in its place.

    The thread ends with `close()`, when this object is no longer referenced, and before the interpreter exits.
    """

    def __init__(self, source: Iterator[T], depth: int = 2):
        self._items: queue.Queue[T | _End] = queue.Queue(depth)
        self._ended = False
        stop = threading.Event()
        # The thread must not hold `self`, which then would never be collected.
        thread = threading.Thread(target=_fill, args=(source, self._items, stop), daemon=True, name="prefetch")
        self._finalizer = weakref.finalize(self, _finish, thread, stop)
        thread.start()

    def __next__(self) -> T:
        if self._ended or not self._finalizer.alive:
            raise StopIteration
        item = self._items.get()
        if isinstance(item, _End):
            self._ended = True
            if item.error is not None:
                raise item.error
            raise StopIteration
        return item

    def close(self) -> None:
        self._finalizer()


def _fill(source: Iterator[T], items: queue.Queue[T | _End], stop: threading.Event) -> None:
    def put(item: T | _End) -> bool:
        while not stop.is_set():
            try:
                items.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    try:
        for item in source:
            if not put(item):
                return
        put(_End())
    except BaseException as error:
        put(_End(error))


def _finish(thread: threading.Thread, stop: threading.Event) -> None:
    stop.set()
    # A collection may run in the thread itself.
    if thread is not threading.current_thread():
        thread.join(timeout=10)
