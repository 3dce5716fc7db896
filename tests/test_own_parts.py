"""Every example of the page on own parts works as it stands: its files are written to a folder, where its commands run."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from PIL import Image

from fastvlp.data.world.corpus import WorldConfig, write_world
from tests.processes import printed_by

TEXT = (Path(__file__).parent.parent / "docs/guide/own-parts.md").read_text(encoding="utf-8")
# A block of Python is called by the last file name before it.
FILES = dict(re.findall(r"`(\w+\.py)`[^`]*?\n\n```python\n(.*?)```", TEXT, re.DOTALL))
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL) for line in block.splitlines()]
# Small enough for a test; what the text says of the options is untouched.
SHORT = "--data.batch-size 4 --vocab 200 --validate-every None --precision fp32"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mine")
    write_world(folder / "demo/world", WorldConfig(size=48, captions=2), train=24, val=6, test=6, pairs=0, singles=0)
    for name, code in FILES.items():
        (folder / name).write_text(code, encoding="utf-8")
    Image.new("RGB", (32, 32), "red").save(folder / "red.png")
    (folder / "my.cards").write_text("red.png ; a red card\nnone.png ; no card\n")
    return folder


def test_each_part_has_an_example() -> None:
    assert {*FILES} == {
        "words.py", "flm_words.py", "margin.py", "conv.py", "bag.py", "yes_no.py", "cards.py", "numpy_index.py",
        "word_table.py", "gap.py",
    }  # fmt: skip
    assert len(COMMANDS) == 13 and all(command.startswith("vlp ") for command in COMMANDS)
    assert FILES["words.py"].count("\n") + FILES["flm_words.py"].count("\n") < 60


@pytest.mark.slow
def test_the_commands_work_in_order(folder: Path) -> None:
    printed = {}
    for command in COMMANDS:
        line = command + (f" {SHORT}" if command.startswith("vlp pretrain") else "")
        line += " --batch-size 4 --precision fp32" if " finetune " in command else ""
        # In a process of its own, which knows no part but those that the command names.
        status, printed[command] = printed_by(shlex.split(line, comments=True)[1:], folder)
        assert status == 0, f"{line}\n{printed[command]}"
    assert "words/words" in (folder / "runs/flm_words/log.jsonl").read_text()
    assert "margin/pairs" in (folder / "runs/margin/log.jsonl").read_text()
    assert "1 no such image" in next(text for command, text in printed.items() if "cards.py" in command)
    assert "accuracy" in next(text for command, text in printed.items() if "evaluate" in command)
    assert "red" in next(text for command, text in printed.items() if "index search" in command)
    assert '"gap"' in (folder / "gap_report/results.json").read_text()
    assert (folder / "words/words.npy").is_file() and (folder / "margin_model/model.safetensors").is_file()
