"""Documents refer to files and log entries that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
LOG = (ROOT / "docs/log.md").read_text(encoding="utf-8")


def entry_numbers() -> list[int]:
    return [int(number) for number in re.findall(r"^## (\d+)\. ", LOG, re.MULTILINE)]


def test_entries_of_the_log_are_numbered_without_a_gap_newest_first():
    entries = entry_numbers()
    assert len(entries) >= 19
    assert entries == list(range(len(entries), 0, -1))


def test_every_entry_has_an_anchor_and_every_reference_an_entry():
    entries = entry_numbers()
    assert [int(number) for number in re.findall(r'<a id="entry-(\d+)"></a>\n## \1\. ', LOG)] == entries
    sources = [*DOCUMENTS, *(ROOT / "src").rglob("*.py"), *(ROOT / "bench").rglob("*.py")]
    for file in sources:
        text = file.read_text(encoding="utf-8")
        references = re.findall(r"\bentry[ -](\d+)|docs/log\.md,\s+entry\s+(\d+)", text)
        assert {int(a or b) for a, b in references} <= {*entries}, file


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_and_named_files_exist(document):
    text = document.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        target, _, anchor = link.partition("#")
        if not target.startswith(("http://", "https://")):
            file = document.parent / target if target else document
            assert file.exists(), link
            assert not anchor or f'id="{anchor}"' in file.read_text(encoding="utf-8") or is_heading(file, anchor), link
    for name in re.findall(r"\b(?:bench|docs|tests|src)/[\w/]+\.(?:py|json|jsonl|md)\b", text):
        assert (ROOT / name).exists(), name


def is_heading(file: Path, anchor: str) -> bool:
    headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
    return anchor in {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
