"""A format in a user's own file: its paths are recognised and its options read, with no change to the package."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from fastvlp.cli import main
from fastvlp.data.records.shards import Shards
from fastvlp.data.sources import formats
from fastvlp.data.sources.importing import import_data
from fastvlp.errors import UserError
from fastvlp.extensions import import_file

OWN = '''
"""Postcards: a line an image, `path | caption`, in a file that ends in .postcards."""

from dataclasses import dataclass

from fastvlp.batch import Dropped, Record
from fastvlp.data.sources.interface import Match, Source


@dataclass(frozen=True, kw_only=True)
class PostcardSource(Source):
    """Postcards."""

    name = "postcards"
    summary = "a .postcards file: `path | caption`, a line an image"

    separator: str = "|"
    """Character between path and caption."""
    skip: int = 0
    """Lines to skip."""
    shout: bool = False
    """Write captions in capital letters."""

    @classmethod
    def match(cls, path):
        return Match.SUFFIX if path.suffix == ".postcards" else Match.NONE

    def read(self, path):
        for line in path.read_text().splitlines()[self.skip :]:
            name, _, caption = line.partition(self.separator)
            file = path.parent / name.strip()
            if not file.is_file():
                yield Dropped(key=name.strip(), reason="no such image")
                continue
            caption = caption.upper() if self.shout else caption
            yield Record(key=file.stem, images=(file.read_bytes(),), info={"captions": [caption]})
'''


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The user's file. Afterwards its format is unknown again."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    path = tmp_path / f"postcards_{tmp_path.name}.py"
    path.write_text(OWN)
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png")
    (tmp_path / "x.postcards").write_text("# postcards\na.png ; a red card\nnone.png ; another\n")
    yield path
    if module := sys.modules.pop(path.stem, None):
        module.PostcardSource.__abstractmethods__ = frozenset({"read"})  # an abstract class is no format


def test_a_path_of_an_own_format_is_recognised_and_its_options_are_read(
    own: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = own.parent / "photos"
    options = ["--skip", "1", "--separator=;", "--shout"]
    words = ["--import", str(own), "data", "import", *options, str(own.parent / "x.postcards"), "--out", str(out)]
    assert main(words) == 0
    assert "train 1" in capsys.readouterr().out
    (record,) = Shards(out / "train")
    assert record.key == "a" and record.info["captions"] == ["A RED CARD"]


def test_help_has_the_options_of_the_paths_format(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--import", str(own), "data", "import"]
    with pytest.raises(SystemExit) as stop:
        main([*words, str(own.parent / "x.postcards"), "--help"])
    shown = capsys.readouterr().out
    assert stop.value.code == 0 and "--separator" in shown and "Character between path and caption" in shown
    assert "--max-side" in shown and "--image-column" not in shown
    with pytest.raises(SystemExit):
        main([*words, "--help"])
    shown = capsys.readouterr().out
    assert "  postcards " in shown and "--separator" in shown and "  table " in shown


def test_an_unknown_option_is_named_with_the_format(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--import", str(own), "data", "import", str(own.parent / "x.postcards"), "--out", str(own.parent / "o")]
    assert main([*words, "--image-column", "image"]) == 2
    error = capsys.readouterr().err
    assert "--image-column is no option of the format postcards" in error and "--separator" in error


def test_in_python_options_are_keywords(own: Path) -> None:
    import_file(own)
    file = own.parent / "x.postcards"
    done = import_data(file, own.parent / "o", split="val", skip=1, separator=";")
    assert done.written == {"val": 1} and [drop.key for drop in done.dropped] == ["none.png"]
    with pytest.raises(UserError, match="`separators` is no option of the format postcards; it has `separator`"):
        import_data(file, own.parent / "o", separators=";")


def test_two_formats_of_one_name_are_an_error(own: Path) -> None:
    own.write_text(OWN.replace('"postcards"', '"table"'))
    import_file(own)
    with pytest.raises(UserError, match="table"):
        formats()
