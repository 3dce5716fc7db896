"""Results of evaluations: kept apart by data set, never lost; help that answers without torch."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from fastvlp.errors import UserError
from fastvlp.eval.result_files import keep_result


def test_data_sets_are_kept_apart_and_results_added(tmp_path):
    run, first, second = tmp_path / "run", tmp_path / "a/set/test", tmp_path / "b/set/test"
    paths = [
        keep_result(run, "retrieval", str(data), {"n": n}) for n, data in enumerate((first, second, first, second))
    ]
    assert [path.name for path in paths] == ["retrieval-set-test.json", "retrieval-set-test-2.json"] * 2
    told = [json.loads(path.read_text()) for path in paths[:2]]
    assert [t["data"] for t in told] == [str(first), str(second)]
    assert [[r["n"] for r in t["results"]] for t in told] == [[0, 2], [1, 3]]
    assert keep_result(run, "probe", str(first), {}).name == "probe-set-test.json"
    assert keep_result(run, "probe", "s3://bucket/数据/val/", {}).name == "probe-数据-val.json"
    with pytest.raises(UserError, match="not the results of an evaluation"):
        paths[0].write_text("{}")
        keep_result(run, "retrieval", str(first), {})


@pytest.mark.parametrize("command", ["task", "retrieval", "zeroshot", "probe"])
def test_help_needs_no_torch(command):
    code = f"""
import sys
from fastvlp.cli import main
try:
    main(["evaluate", "{command}", "--help"])
except SystemExit as stop:
    sys.exit(stop.code or "torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "--device" in done.stdout, done.stderr
