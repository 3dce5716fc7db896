"""The processes of a loader: started, and where one of them ends before its time, the likely cause."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Mapping
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any

from torch.utils.data import DataLoader

from fastvlp.errors import UserError, remedy

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

LESS_MEMORY = "lower `data.workers` or `data.batch_size`, or set `data.cache` to false"
_CRASHED = (
    "a library crashed in reading a record; update Pillow and simplejpeg, or find the record with `vlp data inspect`"
)
_CAUSES: Mapping[int, str] = {
    signal.SIGKILL: f"most likely because memory ran out, which the kernel's log says (`dmesg`); {LESS_MEMORY}",
    signal.SIGBUS: "most likely because /dev/shm is full; give it more room (docker: `shm-size`), or set `data.workers` to 0",
    signal.SIGTERM: "somebody, or the job queue, ended it",
    signal.SIGSEGV: _CRASHED,
    signal.SIGABRT: _CRASHED,
    signal.SIGILL: _CRASHED,
    signal.SIGFPE: _CRASHED,
}
# What torch and multiprocessing say where a process may open no further file: each tensor on its way is one.
_HANDLES = ("too many open files", "ancdata", "errno 24")


def from_workers(loader: DataLoader[Any]) -> Iterator[Any]:
    """Yields the batches that the processes of a loader make. Raises UserError if they cannot be started, or if one of them
    dies."""
    reserve_handles(loader.num_workers)
    before = {*multiprocessing.active_children()}
    handler = signal.getsignal(signal.SIGCHLD)
    try:
        iterator = iter(loader)
    except OSError as error:
        raise UserError(
            f"`data.workers` {loader.num_workers}: cannot start so many processes ({error.strerror or error}); "
            f"{remedy(error, 'lower it')}"
        ) from error
    workers = [child for child in multiprocessing.active_children() if child not in before]
    if threading.current_thread() is threading.main_thread() and handler is not None:
        # Torch's handler raises wherever the process happens to be, also in the middle of an optimiser step. Without it a
        # dead worker is noticed within 5 s, when its batch is due.
        signal.signal(signal.SIGCHLD, handler)
    return _watched(iterator, workers)


def reserve_handles(workers: int) -> None:
    """Raises the number of files that the process may open to what its loader processes take, since these would wait forever
    for a handle. Raises UserError if the system allows fewer."""
    if resource is None:
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # A process has its pipes, the tensors of two batches, and files of its own. Those that are open now are its too.
    needed = len(os.listdir("/dev/fd")) + 32 + 16 * workers  # noqa: PTH208 (names alone)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise UserError(
            f"`data.workers` {workers}: they need {needed} open files, and only {hard} are allowed; lower it, or raise the "
            f"limit with `ulimit -n {2 * needed}`"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def _watched(iterator: Iterator[Any], workers: list[BaseProcess]) -> Iterator[Any]:
    while True:
        try:
            made = next(iterator)
        except StopIteration:
            return
        except (RuntimeError, OSError, EOFError) as error:
            reason = why(error, workers)
            if reason is None:
                raise
            # A traceback keeps its frames, and they the workers: left to the garbage collector these take 5 s each to end.
            del iterator
            raise UserError(reason) from error.with_traceback(None)
        yield made


def why(error: Exception, workers: list[BaseProcess]) -> str | None:
    """Returns the reason why a loader's processes no longer answer; None if they are not the cause."""
    text = str(error).lower()
    # Tensors that a dead process has sent cannot be received any more: that is an error of the connection.
    lost = isinstance(error, ConnectionError | EOFError | FileNotFoundError)
    if lost:
        ended = wait([worker.sentinel for worker in workers], timeout=1)
        for worker in workers:
            worker.join(1 if worker.sentinel in ended else 0)
    dead = [worker for worker in workers if worker.exitcode]
    if any(part in text for part in _HANDLES) or (lost and not dead):
        return f"the loader's processes cannot send their batches: too many open files; {remedy(OSError(errno.EMFILE, ''))}"
    if not dead or not (lost or "worker" in text):
        return None
    code = dead[0].exitcode or 0
    if code > 0:
        return (
            f"a loader process (pid {dead[0].pid}) ended with status {code}; set `data.workers` to 0 to see its error"
        )
    name = signal.Signals(-code).name
    cause = _CAUSES.get(-code, "look at the system's log")
    return f"a loader process (pid {dead[0].pid}) was killed by {name}: {cause}"
