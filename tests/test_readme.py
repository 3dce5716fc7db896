"""The Python of the README works as it stands, on a few made pictures."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pytest
from PIL import Image

from tests.processes import printed_by_code

TEXT = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_ten_lines_of_python(tmp_path: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    assert "steps=1000" in code
    (tmp_path / "new").mkdir()
    with (tmp_path / "my_pairs.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "caption"])
        for i in range(24):
            Image.new("RGB", (120, 120), (10 * i, 0, 0)).save(tmp_path / f"{i}.png")
            writer.writerow([f"{i}.png", f"a red square of brightness {i}"])
    for i in range(3):
        Image.new("RGB", (90, 60), (0, 60 * i, 0)).save(tmp_path / f"new/{i}.jpg")
    printed = printed_by_code(code.replace("steps=1000", "steps=2"), tmp_path)
    # Two texts, three images.
    assert re.search(r"\[\[[^\]]+\]\s*\[[^\]]+\]\]", printed)
    rows = re.findall(r"\[([^\[\]]+)\]", printed[printed.rindex("[[") :])
    assert [len(row.split()) for row in rows] == [3, 3]


def test_every_link_leads_somewhere() -> None:
    root = Path(__file__).parent.parent
    links = [link for link in re.findall(r"\]\(([^)]+)\)", TEXT) if not link.startswith("http")]
    assert links and all((root / link.partition("#")[0]).exists() for link in links)
