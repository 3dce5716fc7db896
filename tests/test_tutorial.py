"""The tutorial, its notebook and the page on other tools work as they stand, in shorter runs."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from fastvlp import Embedder, export
from tests.convert.public_models import write_model
from tests.documents import DOCS, notebook_cells, run_page

SHORT = "--precision fp32 --device cpu"


@pytest.mark.slow
def test_the_tutorial(tmp_path, monkeypatch, capsys):
    pytest.importorskip("chromadb", reason="chromadb is not installed: pip install -e '.[serve]'")
    monkeypatch.chdir(tmp_path)
    served: list[tuple] = []
    monkeypatch.setattr("fastvlp.serve.server.run", lambda *args: served.append(args))
    write_model("clip", Path("public_clip"))
    shorter = {"--steps 200": f"--steps 2 {SHORT}", "openai/clip-vit-base-patch32": "public_clip"}
    shorter["vlp serve "] = "vlp serve --port 0 "
    done = run_page((DOCS / "tutorial.md").read_text(encoding="utf-8"), shorter, served)
    assert [line.split()[1] for line in done] == [
        "data", "data", "pretrain", "export", "index", "index", "serve", "index", "serve",
    ]  # fmt: skip
    assert len(served) == 2
    assert Path("photos/contact-sheet.png").is_file()
    assert len(re.findall(r"a \w+ (?:circle|square)", capsys.readouterr().out)) >= 3


@pytest.mark.slow
def test_the_notebook(tmp_path, monkeypatch, capsys):
    cells = [cell for cell in notebook_cells(DOCS / "photographs_to_search.ipynb") if cell["cell_type"] == "code"]
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in cells)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for cell in cells:
        exec("".join(cell["source"]).replace("steps=200", "steps=2"), names)
    assert names["images"].shape[0] == 60
    lines = capsys.readouterr().out.splitlines()[-3:]
    scores = [float(line.split()[0]) for line in lines]
    assert scores == sorted(scores, reverse=True)


@pytest.mark.slow
def test_an_export_in_sentence_transformers_and_onnxruntime(tmp_path, monkeypatch, capsys):
    for package in ("sentence_transformers", "onnxruntime", "onnxscript"):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    text = (DOCS / "guide/other-tools.md").read_text(encoding="utf-8").partition("## All formats")[0]
    shorter = {
        "--steps 100": f"--steps 2 {SHORT} --data.batch-size 8",
        "--train 3000 --val 400 --test 600": "--train 24 --val 8 --test 4",
    }
    run_page(text, shorter, [])
    printed = re.findall(r"\[\[([^\]]+)\]\]", capsys.readouterr().out)
    by_sentence_transformers, by_onnxruntime = (np.array(row.split(), dtype=float) for row in printed[-2:])
    export("runs/flip_demo", Path("own"))
    ours = Embedder.load("own", device="cpu", precision="fp32")
    expected = (ours.images(["picture.png"]) @ ours.texts(["a red circle", "a blue star"]).T)[0]
    np.testing.assert_allclose(by_sentence_transformers, expected, atol=0.01)
    np.testing.assert_allclose(by_onnxruntime, by_sentence_transformers, atol=0.01)
