"""Runs the examples of a page of the documentation, in their order."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastvlp.cli import main

DOCS = Path(__file__).parent.parent / "docs"
# A block of code, and the name of a file if it is the last word before it.
BLOCK = re.compile(r"(?:`(\w+\.py)`:\n\n)?```(\w+)\n(.*?)```", re.DOTALL)


def run_page(text: str, shorter: Mapping[str, str], served: list[Any]) -> list[str]:
    """Writes the files of a page to the working folder and runs its commands there. Returns the commands of `vlp`.

    Args:
        text: of the page.
        shorter: what is replaced in commands, to make a run short or to name a local model.
        served: gets the arguments of each `vlp serve`, which a test has replaced.
    """
    done = []
    for file, language, code in BLOCK.findall(text):
        if file:
            Path(file).write_text(code, encoding="utf-8")
        for line in code.splitlines() if language == "bash" else ():
            words = shlex.split(replaced(line, shorter), comments=True)
            if words[:1] == ["python"]:
                exec(compile(Path(words[1]).read_text(encoding="utf-8"), words[1], "exec"), {"__name__": "__main__"})
            if words[:1] == ["vlp"]:
                assert main(words[1:]) == 0, line
                done.append(line)
    return done


def replaced(text: str, by: Mapping[str, str]) -> str:
    for old, new in by.items():
        text = text.replace(old, new)
    return text


def notebook_cells(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text(encoding="utf-8"))["cells"]
