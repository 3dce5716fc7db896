"""The documentation site builds without a warning, has no dead link, and shows every public name and recipe."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

import fastvlp
from fastvlp import parts
from fastvlp.recipes import names
from tests.documents import DOCS
from tests.recipe_table import PAGE, with_table

ROOT = DOCS.parent
CONFIG = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")


def test_every_page_is_in_the_navigation():
    listed = re.findall(r"^ +- (?:[^:\n]+: )?(\S+\.md)$", CONFIG, re.MULTILINE)
    assert sorted(listed) == sorted(str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md"))


def test_the_reference_has_every_public_name_once():
    shown = [
        name
        for page in (DOCS / "api").glob("*.md")
        for name in re.findall(r"^::: fastvlp\.(\w+)$", page.read_text(), re.M)
    ]
    assert sorted({*shown} - {"parts"}) == sorted(fastvlp.__all__) and len({*shown}) == len(shown)
    blocks = re.findall(r"^::: fastvlp\.parts\.(\w+)$", (DOCS / "api/parts.md").read_text(), re.MULTILINE)
    assert sorted(blocks) == sorted(parts.__all__)


def test_every_recipe_is_shown_with_its_result():
    shown = re.findall(r"^::: fastvlp\.recipes\.(\w+)$", (DOCS / "recipes.md").read_text(), re.MULTILINE)
    assert sorted(shown) == sorted(names())


def test_the_table_of_recipes_is_that_of_the_recipes():
    page = PAGE.read_text(encoding="utf-8")
    assert page == with_table(page), "the table is out of date: python -m tests.recipe_table"


class Page(HTMLParser):
    """The links of a page, and its anchors."""

    def __init__(self, text: str):
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        for name, value in attributes:
            if name in ("href", "src") and value and tag != "link":
                self.links.append(value)
            if name in ("id", "name") and value:
                self.anchors.add(value)


def dead_links(site: Path) -> list[str]:
    """Links within a built site to pages or anchors that are not there."""
    pages = {file: Page(file.read_text(encoding="utf-8")) for file in site.rglob("*.html") if file.name != "404.html"}
    dead = []
    for file, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (file.parent / unquote(parts.path)).resolve() if parts.path else file
            target = target / "index.html" if target.is_dir() else target
            anchor = unquote(parts.fragment)
            known = pages[target].anchors if target in pages else set()
            if not target.is_file() or (anchor and anchor not in {*known, "__skip"}):
                dead.append(f"{file.relative_to(site)}: {link}")
    return dead


def test_dead_links_are_found(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "index.html").write_text(
        '<a href="a/#here">1</a> <a href="a/#gone">2</a> <a href="b/">3</a> <img src="c.png">'
    )
    (tmp_path / "a/index.html").write_text('<p id="here"><a href="..">up</a> <a href="https://example.org/x">out</a>')
    assert [link.split(": ")[1] for link in dead_links(tmp_path)] == ["a/#gone", "b/", "c.png"]


@pytest.mark.slow
def test_the_site_builds_without_warnings_or_dead_links(tmp_path):
    for package in ("zensical", "mkdocstrings"):
        pytest.importorskip(package, reason=f"{package} is not installed: pip install -e '.[docs]'")
    shutil.copytree(DOCS, tmp_path / "docs")
    config = CONFIG.replace("paths: [src]", f"paths: [{ROOT / 'src'}]")
    (tmp_path / "mkdocs.yml").write_text(config, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "zensical", "build", "--strict", "--clean"],
        cwd=tmp_path, capture_output=True, text=True, timeout=250,
    )  # fmt: skip
    assert done.returncode == 0 and "No issues found" in done.stdout + done.stderr, done.stdout + done.stderr
    assert (tmp_path / "site/guide/data/index.html").is_file()
    assert (tmp_path / "site/photographs_to_search.ipynb").is_file()
    # Shapes and results come from docstrings.
    assert "float32 [n width]" in (tmp_path / "site/api/search/index.html").read_text(encoding="utf-8")
    assert not dead_links((tmp_path / "site").resolve())
