"""The benchmarks run, and what they compare computes the same."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[1] / "bench" / "objectives.py"


def run(*options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, BENCH, *options], capture_output=True, text=True, timeout=120)


@pytest.mark.skipif(not BENCH.exists(), reason="installed without its benchmarks")
def test_objectives_are_timed_beside_their_floor(tmp_path):
    out = tmp_path / "objectives.jsonl"
    size = ("--size", "tiny", "--image", "32", "--vocab", "300", "--batch", "4", "--repetitions", "1")
    done = run(*size, "--device", "cpu", "--arms", "mlm", "flm_plain", "--out", str(out))
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["arm"] for row in rows] == ["mlm", "flm_plain"]
    for row in rows:
        assert row["plain_difference"] < 1e-5
        assert row["cpu_s"] > 0 and row["gradient_cpu_s"] > 0
        assert row["memory_bytes"] > 1e8 and row["parameters"] > 5e5
        assert row["command"].startswith("python bench/objectives.py --size tiny") and row["torch"] and row["commit"]
    assert rows[1]["flops_ratio"] > 2 and rows[0]["flops_ratio"] == 1
    assert "step ms" in done.stdout


@pytest.mark.skipif(not BENCH.exists(), reason="installed without its benchmarks")
def test_an_unknown_arm_is_answered_with_those_there_are():
    done = run("--size", "tiny", "--image", "32", "--vocab", "300", "--no-check", "--arms", "flmm")
    assert done.returncode and "no arm 'flmm'; there are flm, mlm" in done.stderr
