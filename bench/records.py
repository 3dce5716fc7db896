"""Rows of results: the commit, device and command that each row carries, and the file that rows are appended to."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def stamp(device: str, script: str) -> dict[str, Any]:
    """Time, commit (with `+changes` where files differ from it), device, torch version and command of this process.

    `script`: name of the file in bench/."""
    commit, changed = git("rev-parse", "--short", "HEAD"), git("status", "--porcelain", "../src", "*.py")
    cuda = torch.device(device).type == "cuda"
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": commit + ("+changes" if changed not in ("", commit) else ""),
        "device_name": torch.cuda.get_device_name() if cuda else cpu_name(),
        "torch": torch.__version__,
        "command": " ".join([f"python bench/{script}", *sys.argv[1:]]),
    }


def git(*words: str) -> str:
    """The output of a git command, run in bench/; where there is no git or no repository, what FASTVLP_COMMIT says, or
    `unknown`."""
    try:
        done = subprocess.run(["git", *words], capture_output=True, text=True, cwd=Path(__file__).parent, check=True)
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("FASTVLP_COMMIT", "unknown")
    return done.stdout.strip()


def cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def append(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Appends each row as a line of JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def mean(values: Sequence[float]) -> str:
    """Mean and standard deviation."""
    return f"{statistics.mean(values):.1f}" + (f" ± {statistics.stdev(values):.1f}" if values[1:] else "")
