import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from fastvlp.cli import main
from fastvlp.data.records.shards import Shards


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    for i in range(10):
        Image.new("RGB", (40, 20 + i), (i * 20, 0, 0)).save(tmp_path / f"in/{i}.png")
        (tmp_path / f"in/{i}.txt").write_text(f"picture number {i}\n第{i}张图片\n", encoding="utf-8")
    (tmp_path / "in/9.png").write_bytes(b"broken")
    return tmp_path


def test_import_then_inspect(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = folder / "out"
    assert main(["data", "import", str(folder / "in"), "--out", str(out), "--val", "0.3", "--max-side", "30"]) == 0
    shown = capsys.readouterr().out
    assert "dropped 1" in shown and "not an image" in shown
    assert sum(len(Shards(out / split)) for split in ("train", "val")) == 9
    assert json.loads((out / "dropped.jsonl").read_text())["key"] == "9"
    assert main(["data", "inspect", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "captions, words" in shown and "contact-sheet.png" in shown
    assert Image.open(out / "contact-sheet.png").width > 1000


def test_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--train", "4", "--val", "2", "--test", "2", "--pairs", "4", "--singles", "0", "--size", "32"]
    assert main(["data", "demo", "--out", str(tmp_path / "w"), *sizes]) == 0
    assert "train 4" in capsys.readouterr().out
    assert len(Shards(tmp_path / "w/train")) == 4


def test_a_users_mistake_is_one_line_and_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "import", str(tmp_path / "none.csv"), "--out", str(tmp_path / "o")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {tmp_path}/none.csv: ") and error.count("\n") == 1
    assert main(["data", "inspect", str(tmp_path / "none")]) == 2
    assert "no shards" in capsys.readouterr().err


def test_a_misspelt_word_is_answered_with_the_right_ones(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["data", "import", "x", "--out", "y", "--max-sid", "3"])
    assert stop.value.code == 2 and "--max-side" in capsys.readouterr().err
    assert main(["data", "import", "x", "--out", "y", "--format", "tabel"]) == 2
    assert "table" in capsys.readouterr().err


def test_an_option_of_another_format_is_named_with_the_paths_own(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", "import", str(folder / "in"), "--out", str(folder / "out"), "--image-column", "image"]) == 2
    assert "--image-column is no option of the format folder" in capsys.readouterr().err
    (folder / "in/t.csv").write_text("pic,text\n0.png,x\n")
    assert main(["data", "import", str(folder / "in/t.csv"), "--out", str(folder / "out")]) == 2
    assert "--image-column" in capsys.readouterr().err
    assert main(["data", "import", "--image-column", "pic", str(folder / "in/t.csv"), "--out", str(folder / "o")]) == 0


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["dta", "inspect", "x"], "dta: not a command of `vlp`; did you mean data?"),
        (["xyz"], "xyz: not a command of `vlp`; choose from data, pretrain"),
        (["data", "inspct", "photos"], "inspct: not a command of `vlp data`; did you mean inspect?"),
        (["index", "serch", "a"], "serch: not a command of `vlp index`; did you mean search?"),
        (
            ["evaluate", "retreival", "run", "--data", "x"],
            "retreival: not a command of `vlp evaluate`; did you mean retrieval?",
        ),
        (["records"], "`vlp records` needs a further word: verify"),
        (["evaluate", "nowhere"], "nowhere: not the folder of a run"),
        (["evaluate", "runs/probe"], "runs/probe: not the folder of a run"),
    ],
)
def test_a_misspelt_command_is_named_with_the_nearest(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(argv) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")


def test_a_run_may_be_called_much_like_a_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tasks").mkdir()
    assert main(["evaluate", "tasks"]) == 2
    assert "tasks: not the folder of a run" in capsys.readouterr().err


def test_help_does_not_load_torch() -> None:
    code = "import sys; sys.argv = ['vlp', '--help']\ntry:\n    from fastvlp.cli import main; main()\nfinally:\n"
    code += "    assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "data" in done.stdout


def test_python_m() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fastvlp", "data", "--help"], capture_output=True, text=True, check=True
    )
    assert "inspect" in done.stdout
