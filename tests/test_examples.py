"""The examples of the guide that no other test runs work as they stand, on a small corpus; every example has a test."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from PIL import Image
from starlette.testclient import TestClient

from fastvlp import import_data, recipe
from fastvlp.cli import main
from fastvlp.data.world.corpus import WorldConfig, write_world
from fastvlp.training.train_config import check
from tests.documents import BLOCK, DOCS, run_page

ROOT = DOCS.parent
PAGES = [ROOT / "README.md", *(page for page in sorted(DOCS.rglob("*.md")) if page.name != "log.md")]
# Which test runs the Python of a page. tests/test_commands.py parses every command of `vlp` on all of them.
RUN_BY = {
    "README.md": "tests/test_readme.py",
    "docs/api/index.md": "tests/test_examples.py",
    "docs/tutorial.md": "tests/test_tutorial.py",
    "docs/guide/evaluate.md": "tests/eval/test_mteb.py",
    "docs/guide/other-tools.md": "tests/test_tutorial.py",
    "docs/guide/own-parts.md": "tests/test_own_parts.py",
    "docs/guide/pretrain.md": "tests/test_examples.py",
    "docs/guide/python.md": "tests/test_examples.py",
}
# Other programs of the commands: these install and download, so no test runs them.
PROGRAMS = {"vlp", "python", "curl", "torchrun", "pip", "python3", "source", "make"}
SHORT = ["--precision", "fp32", "--device", "cpu"]


def page(name: str) -> str:
    return (DOCS / "guide" / name).read_text(encoding="utf-8")


def test_every_example_is_of_a_kind_that_is_run():
    with_python = set()
    for file in PAGES:
        for _, language, code in BLOCK.findall(file.read_text(encoding="utf-8")):
            assert language in ("bash", "python", "json", "text"), file
            if language == "python":
                with_python.add(str(file.relative_to(ROOT)))
            if language == "bash":
                lines = [line for line in code.replace("\\\n", " ").splitlines() if line and not line.startswith("#")]
                assert {line.split()[0] for line in lines} <= PROGRAMS, file
    assert with_python == {*RUN_BY}
    for name, test in RUN_BY.items():
        assert Path(name).name in (ROOT / test).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with the runs and the corpus that the guide's examples name."""
    folder = tmp_path_factory.mktemp("guide")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_world("demo/world", WorldConfig(size=48, captions=2), train=24, val=8, test=8, pairs=0, singles=0)
        for name in ("flm_demo", "flip_demo"):
            short = ["--steps", "2", "--data.batch-size", "4", "--vocab", "200", "--validate-every", "None", *SHORT]
            assert main(["pretrain", name, *short]) == 0
        tuned = ["--steps", "2", "--batch-size", "4", *SHORT]
        assert main(["finetune", "caption", "--from", "runs/flm_demo", "--data", "demo/world", *tuned]) == 0
        assert main(["export", "runs/flip_demo", "exports/flip"]) == 0
    for name, colour in (("a", "red"), ("b", "blue")):
        Image.new("RGB", (60, 40), colour).save(folder / f"{name}.jpg")
    return folder


@pytest.mark.slow
def test_the_page_on_python(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    ((_, _, code),) = BLOCK.findall(page("python.md"))
    names: dict = {}
    exec(code, names)
    assert names["images"].shape[:2] == (2, 3) and names["states"].shape[0] == names["pair"].shape[0] == 2
    captions, cosines = capsys.readouterr().out.splitlines()[-2:]
    assert len(eval(captions)) == 2 and len(re.findall(r"-?\d\.\d+", cosines)) == 2


@pytest.mark.slow
def test_the_page_on_search(folder, monkeypatch):
    pytest.importorskip("chromadb", reason="chromadb is not installed: pip install -e '.[serve]'")
    monkeypatch.chdir(folder)
    served: list[tuple] = []
    monkeypatch.setattr("fastvlp.serve.server.run", lambda *args: served.append(args))
    text = page("search.md").partition("| route |")[0]
    done = run_page(text, {"exports/flip": "exports/again", "vlp serve ": "vlp serve --port 0 "}, served)
    assert [line.split()[1] for line in done] == ["export", "embed", "index", "index", "serve"]
    from fastvlp.serve.api import create_app

    ((embedder, index, pictures, *_),) = served
    with TestClient(create_app(embedder, index, pictures=pictures), base_url="http://127.0.0.1:8000") as client:
        questions = [shlex.split(line) for line in re.findall(r"^curl .*$", text, re.MULTILINE)]
        answers = [client.post(words[1], json=json.loads(words[-1])) for words in questions]
    assert [answer.status_code for answer in answers] == [200, 200]
    assert len(answers[0].json()["data"]) == 1 and len(answers[1].json()["results"]) == 3


def test_a_recipe_of_ones_own(tmp_path, monkeypatch):
    ((_, code),) = re.findall(r"```(python)\n(.*?)```", page("pretrain.md"), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    Path("my_photos.py").write_text(code, encoding="utf-8")
    run = recipe("my_photos.py")
    check(run)
    assert (run.name, run.steps, run.data.batch_size) == ("my_photos", 2000, 64)


def test_json_lines_are_imported(tmp_path, monkeypatch):
    (lines,) = re.findall(r"```json\n(.*?)```", page("data.md"), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    Path("pairs.jsonl").write_text(lines, encoding="utf-8")
    Path("images").mkdir()
    for line in lines.splitlines():
        Image.new("RGB", (40, 30), "red").save(json.loads(line)["image"])
    imported = import_data(Path("pairs.jsonl"), Path("photos"))
    assert imported.written == {"train": 3}, imported
