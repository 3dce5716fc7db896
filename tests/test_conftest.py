"""Failures are printed while the other tests still run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = """
def test_first():
    print("printed by the first")
    assert "first" == "wrong"

def test_second():
    pass
"""


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("-n", "1")], ids=["one process", "xdist"])
def test_a_failure_is_printed_before_the_next_test_runs_and_only_once(tmp_path, options):
    conftest = Path(__file__).with_name("conftest.py").read_text(encoding="utf-8")
    (tmp_path / "conftest.py").write_text(conftest, encoding="utf-8")
    (tmp_path / "test_two.py").write_text(TESTS, encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-v", "-p", "xdist", "-p", "no:cacheprovider", *options, "test_two.py"]
    # conftest.py names a plugin, which is found from the folder above the tests.
    paths = [str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1, done.stderr
    failure, second = "assert 'first' == 'wrong'", done.stdout.rindex("test_second")
    assert done.stdout.index(failure) < second and done.stdout.index("printed by the first") < second
    assert done.stdout.count("printed by the first") == 2  # the source line, and what it printed
    assert "FAILED test_two.py::test_first" in done.stdout
