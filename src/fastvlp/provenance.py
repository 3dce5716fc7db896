"""The provenance of a number: device, versions, commit, command, date."""

from __future__ import annotations

import datetime
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return (
            f"{torch.cuda.get_device_name(device)}, {torch.cuda.get_device_properties(device).total_memory >> 30} GiB"
        )
    return (
        f"{_processor()}, {len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()} cores"
    )


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def commit() -> str:
    """Returns the commit of the checkout that this package runs from, with `+` if it has changes. For an installed package, and
    for a copy of a checkout without git, returns the value of FASTVLP_COMMIT, which is empty by default."""

    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10, check=True
        )
        return done.stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return os.environ.get("FASTVLP_COMMIT", "")


def data_name(path: str) -> str:
    """Returns the last two names of a path: enough to tell data sets apart, and nothing about the machine."""
    return "/".join(path.rstrip("/").split("/")[-2:])


def code() -> dict[str, str]:
    """Version and commit of this package, and the version of torch."""
    try:
        package = version("fastvlp")
    except PackageNotFoundError:
        package = ""
    return {"fastvlp": package, "commit": commit(), "torch": torch.__version__}


def other_code(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Returns the differences in commit and versions between two results of `about` or `code`, if both know them: (first,
    second) by name."""
    names = [name for name in ("fastvlp", "commit", "torch") if name in first and name in second]
    return {name: (first[name], second[name]) for name in names if first[name] != second[name]}


def about(device: torch.device) -> dict[str, Any]:
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        **code(),
        "python": platform.python_version(),
        "command": shlex.join(["vlp", *sys.argv[1:]]),
        "date": datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M"),
    }
