"""Settings that hold before torch is imported, and failures that are printed when they happen."""

from __future__ import annotations

import atexit
import gc
import os
import shutil
import tempfile
from collections.abc import Iterator

import pytest

# pytest runs one process a core: one thread in each, none that spins while it waits.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# Indexes of shards that cannot be written beside them.
os.environ["FASTVLP_CACHE"] = tempfile.mkdtemp(prefix="fastvlp-cache-")
atexit.register(shutil.rmtree, os.environ["FASTVLP_CACHE"], ignore_errors=True)

# Files outlive a killed process without it; only a machine that loses its power needs it.
os.fsync = lambda file: None

# What importing the tests makes stays for ever: looking through it for garbage costs a second and finds nothing.
gc.disable()

# Fixtures of search, exporters and serve.
pytest_plugins = ["tests.exported"]


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    # Each module goes to one worker: what its tests share is made once.
    if getattr(config.option, "numprocesses", None) and config.option.dist == "no":
        config.option.dist = "loadfile"
        # In the order in which they were collected, not those with most tests first.
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Files with whole runs first: at the end the workers share short ones.
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    try:
        return (yield)
    finally:
        gc.enable()
        gc.freeze()


def pytest_configure(config: pytest.Config) -> None:
    is_xdist_worker = hasattr(config, "workerinput")
    if not is_xdist_worker and config.option.tbstyle != "no":
        config.pluginmanager.register(FailuresAtOnce(config))


class FailuresAtOnce:
    """Prints the traceback and the output of a failed test as soon as it has failed, instead of after the last test."""

    def __init__(self, config: pytest.Config):
        self.config = config

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.print_failure(report, report.nodeid)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self.print_failure(report, f"collecting {report.nodeid}")

    def print_failure(self, report: pytest.TestReport | pytest.CollectReport, title: str) -> None:
        if not report.failed:
            return
        terminal = self.config.get_terminal_writer()
        terminal.line()
        terminal.sep("_", title, red=True)
        report.toterminal(terminal)
        for name, text in report.sections:
            terminal.sep("-", name)
            terminal.line(text)
        terminal.flush()

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self) -> None:
        # All have been printed: the summary only lists them.
        self.config.option.tbstyle = "no"
