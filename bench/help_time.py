"""CPU time of `vlp ... --help` in this checkout, beside that of an earlier commit and of `import torch`, in turns.

    python bench/help_time.py --commit c489e49

Each is a process of its own on one thread, whose user and system time is counted; the first round, in which Python compiles
what it imports, does not count. Prints medians in seconds.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

import tyro
from records import RESULTS, append, stamp

ROOT = Path(__file__).parents[1]
HELPS = {"vlp": [], "vlp pretrain flm_demo": ["pretrain", "flm_demo"], "vlp data import": ["data", "import"]}


def main(commit: str = "c489e49", rounds: int = 7) -> None:
    """
    Args:
        commit: The earlier commit.
        rounds: Turns of each process.
    """
    with tempfile.TemporaryDirectory() as folder:
        archive = subprocess.run(["git", "archive", commit, "src"], cwd=ROOT, capture_output=True, check=True)
        subprocess.run(["tar", "-x", "-C", folder], input=archive.stdout, check=True)
        sources = {"before": Path(folder) / "src", "after": ROOT / "src"}
        calls = {("import torch", "before"): ["-c", "import torch"]}
        calls |= {
            (name, when): ["-m", "fastvlp", *words, "--help"] for name, words in HELPS.items() for when in sources
        }
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        environment |= {"OMP_NUM_THREADS": "1", "PYTHONPYCACHEPREFIX": f"{folder}/compiled"}
        seconds: dict[tuple[str, str], list[float]] = {call: [] for call in calls}
        for _ in range(rounds + 1):
            for (name, when), words in calls.items():
                spent = cpu_seconds([sys.executable, *words], {**environment, "PYTHONPATH": str(sources[when])})
                seconds[name, when].append(spent)
    for name in [*HELPS, "import torch"]:
        values = {when: round(median(seconds[name, when][1:]), 3) for when in sources if (name, when) in seconds}
        print(f"{name}: {values}")
        append(
            RESULTS / "help_time.jsonl",
            [stamp("cpu", "help_time.py") | {"what": name, "beside": commit, "rounds": rounds} | values],
        )


def cpu_seconds(command: list[str], environment: dict[str, str]) -> float:
    """User and system time of a process."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


if __name__ == "__main__":
    tyro.cli(main)
