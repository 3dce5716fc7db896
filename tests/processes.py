"""Processes that compute together: they are forked from one that has imported PyTorch once for all of them."""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import socket
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from fastvlp import dist
from fastvlp.cli import main

# The first optimiser of a process imports `torch._dynamo`, which takes seconds.
IMPORTED = [
    "torch._dynamo",
    "fastvlp.training.loop",
    "fastvlp.recipes.flm_demo",
    "fastvlp.data.world.corpus",
    "fastvlp.search.bulk",
]


def context() -> ForkServerContext:
    """Context for processes that have none of the threads, models and patches of the tests. They get their environment when
    the first of them starts."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    return context


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start_processes(
    work: Callable[..., None], arguments: Iterable[Any], count: int, *, join: bool = True
) -> torch.multiprocessing.ProcessContext | None:
    """Runs `work(rank, *arguments)` in so many processes. Without `join` they are returned."""
    context()
    return torch.multiprocessing.start_processes(
        work, tuple(arguments), nprocs=count, join=join, start_method="forkserver"
    )


def be_rank(rank: int, world: int, port: int) -> None:
    """Sets what torchrun sets in each process."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)


def as_joined_rank(rank: int, world: int, port: int, work: Callable[..., None], arguments: Iterable[Any]) -> None:
    be_rank(rank, world, port)
    with dist.process_group():
        work(*arguments)


def on_ranks(world: int, work: Callable[..., None], *arguments: Any) -> None:
    """Runs a function in each of so many processes, which have joined."""
    start_processes(as_joined_rank, (world, free_port(), work, arguments), world)


def in_new_process(work: Callable[..., Any], *arguments: Any) -> Any:
    """Returns what a function returns in a process that has imported no file of a user's own. It must be one of a module."""
    with context().Pool(1) as pool:
        return pool.apply(work, arguments)


def printed_by(words: Sequence[str], folder: Path | None = None) -> tuple[Any, str]:
    """The exit status of a command of `vlp` in a new process, and all that it printed. `folder`: where it runs."""
    return in_new_process(run_command, words, folder)


def run_command(words: Sequence[str], folder: Path | None = None) -> tuple[Any, str]:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        if folder is not None:
            os.chdir(folder)
        try:
            status = main(list(words))
        except SystemExit as ended:  # after a help
            status = ended.code
    return status, printed.getvalue()


def start_command(words: Sequence[str], printed: Path) -> BaseProcess:
    """Starts a command of `vlp` in a new process. `printed`: a file for all that it prints."""
    process = context().Process(target=write_output, args=(words, printed))
    process.start()
    return process


def write_output(words: Sequence[str], printed: Path) -> None:
    with printed.open("w", buffering=1) as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        try:
            sys.exit(main(list(words)))
        except Exception:
            traceback.print_exc()
            raise


def printed_by_code(code: str, folder: Path) -> str:
    """Returns the output of Python code in a new process. `folder`: where it runs."""
    return in_new_process(run_code, code, folder)


def run_code(code: str, folder: Path) -> str:
    os.chdir(folder)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "<code>", "exec"), {"__name__": "__main__"})
    return printed.getvalue()
