"""bench/gpu.sh, which measures everything on one GPU: its commands parse, and in tiny sizes they run on a CPU."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from fastvlp.cli import main
from fastvlp.provenance import commit

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


def test_a_copy_without_git_says_its_commit_by_a_variable(monkeypatch):
    assert commit() != "abc1234"
    monkeypatch.setenv("FASTVLP_COMMIT", "abc1234")
    monkeypatch.setenv("GIT_DIR", "/nowhere")
    assert commit() == "abc1234"
    monkeypatch.delenv("FASTVLP_COMMIT")
    assert commit() == ""


@pytest.mark.skipif("FASTVLP_LONG_TESTS" not in os.environ, reason="takes many minutes; set FASTVLP_LONG_TESTS=1")
@pytest.mark.timeout(1600)
def test_all_steps_run_in_tiny_sizes(tmp_path):
    run_script(tmp_path, GPU_SH_TINY="1", SECONDS_IN_ALL="1400", OMP_NUM_THREADS="1")
    steps = dict(line.split("\t")[:2] for line in (tmp_path / "steps.tsv").read_text().splitlines())
    # A machine without a GPU has no nvidia-smi.
    failed = {name: code for name, code in steps.items() if code != "0" and name != "nvidia-smi"}
    assert not failed, (tmp_path / "log.txt").read_text()[-3000:]
    parts = {"b16", "b32", "flm", "released", "options", "losses", "pairs", "scenes", "compare", "largest", "parity"}
    assert parts <= {*steps}
    for name in ("speed.jsonl", "released.jsonl", "losses.jsonl", "comparison/results.json", "comparison/report.html"):
        text = (tmp_path / name).read_text()
        assert text and str(tmp_path) not in text
    names = [json.loads(line)["name"] for line in (tmp_path / "speed.jsonl").read_text().splitlines()]
    for name in (
        "clip_photos keep=0.25",
        "clip_photos group_texts=true",
        "prefixlm_photos",
        "flm_photos recompute=true",
    ):
        assert name in names


def test_a_part_that_fails_does_not_stop_the_others(tmp_path):
    """Here all fail: this Python knows no module at all."""
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho no module; exit 1\n")
    python.chmod(0o755)
    run_script(tmp_path / "out", GPU_SH_TINY="1", PYTHON=str(python))
    steps = [line.split("\t") for line in (tmp_path / "out" / "steps.tsv").read_text().splitlines()]
    codes = {name: code for name, code, _ in steps if name != "nvidia-smi"}
    assert {"b16", "b16-alone", "flm", "compare", "parity", "scenes"} <= {*codes} and {*codes.values()} == {"1"}
    assert (tmp_path / "out" / "log.txt").read_text().count("no module") == len(codes)
