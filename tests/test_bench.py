"""The benchmarks run, and what they compare computes the same."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.train.runs import made_pairs

BENCH = Path(__file__).parents[1] / "bench" / "objectives.py"


def run(*options: str, script: str = "objectives.py") -> subprocess.CompletedProcess[str]:
    script = str(BENCH.with_name(script))
    return subprocess.run([sys.executable, script, *options], capture_output=True, text=True, timeout=120)


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


@pytest.mark.skipif(not BENCH.exists(), reason="installed without its benchmarks")
def test_batches_of_one_length_are_timed_beside_batches_as_they_come(tmp_path):
    out = tmp_path / "batching.jsonl"
    size = ("--rows", "4000", "--max-tokens", "512", "--width", "64", "--depth", "1", "--repetitions", "1")
    done = run(*size, "--device", "cpu", "--out", str(out), script="batching.py")
    assert done.returncode == 0, done.stderr
    random, released, grouped = (json.loads(line) for line in out.read_text().splitlines())
    assert random["padding"] > 0.2 > 0.02 > grouped["padding"]
    assert released["fill"] < 0.5 < 0.7 < grouped["fill"] <= 1
    assert all(row["tokens_per_s"] > 0 and row["commit"] for row in (random, released, grouped))
    assert random["command"].startswith("python bench/batching.py --rows 4000") and random["speed_ratio"] == 1


@pytest.mark.skipif(not BENCH.exists(), reason="installed without its benchmarks")
def test_what_grouping_saves_each_objective_is_counted(tmp_path):
    out = tmp_path / "batching.jsonl"
    told = ("--captions", str(made_pairs(tmp_path) / "train"), "--size", "tiny", "--image", "32", "--batch", "4")
    done = run(*told, "--out", str(out), script="batching.py")
    assert done.returncode == 0, done.stderr
    random, grouped = (json.loads(line) for line in out.read_text().splitlines())
    assert grouped["padding"] < random["padding"] and 1 < grouped["flm_over_ar"] < random["flm_over_ar"]
    assert grouped["mlm_gflops_per_row"] < random["mlm_gflops_per_row"]
