"""bench/gpu.sh, which measures everything on one GPU: its commands parse, and in tiny sizes they run on a CPU."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from fastvlp.cli import main

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "bench" / "gpu.sh"
pytestmark = pytest.mark.skipif(not SCRIPT.exists(), reason="installed without its benchmarks")


def run_script(out: Path, **variables: str) -> str:
    environment = {**os.environ, "OUT": str(out), "PYTHON": sys.executable, **variables}
    done = subprocess.run(["bash", str(SCRIPT)], env=environment, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("tiny", ["", "1"])
def test_each_command_is_understood(tiny, tmp_path, monkeypatch):
    runs = []
    monkeypatch.setattr("fastvlp.cli.run", lambda name, ready: runs.append(name))
    lines = [
        line for line in run_script(tmp_path, GPU_SH_DRY="1", GPU_SH_TINY=tiny).splitlines() if line.startswith("vlp ")
    ]
    for line in lines:
        assert main(shlex.split(line)[1:]) == 0
    assert runs.count("bench") >= 6 and {"data demo", "compare"} <= {*runs} and len(runs) == len(lines)


def test_the_wheels_are_fetched_by_a_script_that_parses():
    for script in (SCRIPT, SCRIPT.with_name("gpu_wheels.sh")):
        assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0


@pytest.mark.skipif("FASTVLP_LONG_TESTS" not in os.environ, reason="takes many minutes; set FASTVLP_LONG_TESTS=1")
@pytest.mark.timeout(1600)
def test_all_steps_run_in_tiny_sizes(tmp_path):
    run_script(tmp_path, GPU_SH_TINY="1", SECONDS_IN_ALL="1400", OMP_NUM_THREADS="1")
    steps = dict(line.split("\t")[:2] for line in (tmp_path / "steps.tsv").read_text().splitlines())
    # A machine without a GPU has no nvidia-smi.
    failed = {name: code for name, code in steps.items() if code != "0" and name != "nvidia-smi"}
    assert not failed, (tmp_path / "log.txt").read_text()[-3000:]
    assert {"parity", "b32", "flm", "muon", "largest", "compare"} <= {*steps}
    assert (tmp_path / "speed.jsonl").exists() and (tmp_path / "results.json").exists()
