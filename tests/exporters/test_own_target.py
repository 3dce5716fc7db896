"""An export target in a user's own file works without a change to the package."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from fastvlp import export
from fastvlp.cli import main
from fastvlp.errors import UserError
from fastvlp.extensions import import_file
from fastvlp.model.saving import load_model
from tests.processes import printed_by

TARGET = Path(__file__).with_name("numpy_target.py")


def test_the_command_exports_to_the_users_target(runs, tmp_path, capsys):
    argv = ["--import", str(TARGET), "export", str(runs["towers"]), str(tmp_path / "out"), "--to", "numpy"]
    assert main(argv) == 0
    assert "arrays.npz" in capsys.readouterr().out
    with np.load(tmp_path / "out" / "arrays.npz") as arrays:
        table = load_model(runs["towers"]).model.text.word_table.detach().numpy()
        assert arrays["words"].shape == table.shape and np.abs(arrays["words"] - table).max() < 1e-3


@pytest.mark.slow
def test_the_help_lists_it():
    # In a new process: a command line that was made before knows the targets of that time.
    status, printed = printed_by(["--import", str(TARGET), "export", "--help"])
    assert status == 0 and "numpy (two arrays)" in " ".join(printed.replace("│", " ").split())


def test_a_function_gives_facts_files_and_differences(runs, tmp_path):
    import_file(TARGET)
    exported = export(runs["towers"], tmp_path / "out", to="numpy", license="mit")
    assert exported.files == ["arrays.npz", "card.json"] and exported.card["license"] == "mit"
    assert 0 < exported.differences["words"] < 1e-3 and exported.differences["grey picture"] == 0


def test_a_run_that_does_not_fit_is_refused(runs, tmp_path):
    import_file(TARGET)
    with pytest.raises(UserError, match=r"model\.embed"):
        export(runs["vqa"], tmp_path / "out", to="numpy")
    with pytest.raises(UserError, match="numpy, onnx"):
        export(runs["towers"], tmp_path / "out", to="nmpy")
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize("differences", [{"words": 0.1}, {"words": float("nan")}])
def test_an_export_that_differs_from_the_run_is_removed(runs, tmp_path, monkeypatch, differences: Mapping[str, float]):
    target = import_file(TARGET).NumpyExport
    monkeypatch.setattr(target, "differences", lambda self, source, folder: differences)
    with pytest.raises(UserError, match="words by"):
        export(runs["towers"], tmp_path / "out", to="numpy")
    assert [*tmp_path.iterdir()] == []


def test_a_missing_file_is_reported(runs, tmp_path, monkeypatch):
    target = import_file(TARGET).NumpyExport
    monkeypatch.setattr(target, "files", (*target.files, "notes.txt"))
    with pytest.raises(UserError, match=r"notes\.txt"):
        export(runs["towers"], tmp_path / "out", to="numpy")
    assert [*tmp_path.iterdir()] == []


def test_an_export_equals_its_run(runs, tmp_path):
    assert export(runs["all"], tmp_path / "out").differences == {"parameters": 0, "heads": 0}
