import io
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from fastvlp.batch import Record
from fastvlp.cli_results import show_inspection
from fastvlp.data.records.detections import Detections, pack
from fastvlp.data.records.shards import ShardWriter
from fastvlp.data.sources import contact_sheet as sheets
from fastvlp.data.sources.inspection import SplitReport, as_tables, inspect_data
from fastvlp.data.tokenize import Tokenizer
from fastvlp.errors import UserError


def jpeg(width: int = 24, height: int = 16) -> bytes:
    file = io.BytesIO()
    noise = np.random.default_rng(width).integers(0, 255, (height, width, 3), dtype=np.uint8)
    Image.fromarray(noise).save(file, "JPEG")
    return file.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    with ShardWriter(tmp_path / "train") as writer:
        for i in range(6):
            info = {"captions": ["one two three", "four"], "captions_zh": ["一二三四五"]}
            writer.write(Record(key=f"r{i}", images=(jpeg(24 + i),), info=info))
        writer.write(Record(key="cut", images=(jpeg(200, 200)[:3000],), info={"captions": ["x"]}))
    with ShardWriter(tmp_path / "pairs") as writer:
        info = {"statements": [{"text": "both are noise", "label": True}]}
        writer.write(Record(key="p", images=(jpeg(), jpeg(30)), info=info))
    return tmp_path


def test_counts_sizes_lengths_and_names(folder: Path) -> None:
    tokenizer = Tokenizer.train(["one two three four"], kind="wordpiece", vocab_size=100)
    tokenizer.save(folder / "tokenizer.json")
    pairs, train = inspect_data(folder, tokenizer=folder / "tokenizer.json").splits
    assert (pairs.name, pairs.records, pairs.images) == ("pairs", 1, 2)
    assert pairs.lengths[("statements", "words")] == [3]
    assert train.records == 6 and train.fields == {"captions": 6, "captions_zh": 6}
    assert train.sizes[(24, 16)] == 1 and train.formats == {"JPEG RGB": 6}
    assert train.lengths[("captions", "words")] == [3, 1] * 6
    assert train.lengths[("captions_zh", "characters")] == [5] * 6
    assert train.lengths[("captions", "tokens")][:2] == tokenizer.encode(["one two three", "four"], 99)[1].tolist()
    (unreadable,) = train.unreadable
    assert unreadable.key == "cut"
    file = io.StringIO()
    Console(file=file, width=60).print(as_tables([pairs, train]))
    assert "cut" in file.getvalue() and "truncated" in file.getvalue()


def test_every_field_of_texts_is_measured(tmp_path: Path) -> None:
    fields = {"questions": ("question", "answers", {"a": 1.0}), "statements": ("text", "label", True)}
    info: dict[str, object] = {"captions_de": ["eine Katze", 3], "captions_by": "someone"}
    for name, (text, other, value) in fields.items():
        info |= {name: [{text: "one two", other: value}], f"{name}_zh": [{text: "一二三", other: value}]}
    with ShardWriter(tmp_path / "s") as writer:
        writer.write(Record(key="r", images=(jpeg(),), info=info))
    (report,) = inspect_data(tmp_path / "s").splits
    assert report.lengths == {
        ("captions_de", "characters"): [10],
        ("captions_de", "words"): [2],
        ("questions", "characters"): [7],
        ("questions", "words"): [2],
        ("questions_zh", "characters"): [3],
        ("statements", "characters"): [7],
        ("statements", "words"): [2],
        ("statements_zh", "characters"): [3],
    }


@pytest.mark.parametrize("width", [80, 60])
def test_names_are_whole_on_a_narrow_terminal(width: int) -> None:
    names = [f"{kind}-{split}" for kind in ("pairs", "singles", "test-new", "x") for split in ("train", "val")]
    fields = ["background", "captions", "captions_zh", "class_distribution", "questions_zh", "statements_zh"]
    lengths = {("captions_zh", unit): [100_000] * 9 for unit in ("characters", "tokens")}
    reports = [
        SplitReport(
            name=name,
            records=123_456,
            fields=Counter(dict.fromkeys(fields, 123_456)),
            sizes=Counter({(4000, 3000): 9}),
            formats=Counter({"JPEG RGB": 123_456, "PNG RGBA": 1}),
            lengths=lengths,
        )
        for name in names
    ]
    file = io.StringIO()
    Console(file=file, width=width).print(as_tables(reports))
    shown = file.getvalue()
    assert "…" not in shown and max(map(len, shown.splitlines())) <= width
    if width == 80:  # below, the longest are folded
        assert all(shown.count(name) >= 3 for name in names)
        assert all(shown.count(field) >= len(names) for field in fields)


def test_a_cut_tar_is_reported_and_the_rest_is_counted(folder: Path) -> None:
    tar = folder / "train/00000.tar"
    tar.write_bytes(tar.read_bytes()[:9000])
    (train,) = inspect_data(folder / "train").splits
    assert 0 < train.records < 6
    assert any("cut" in drop.reason for drop in train.unreadable)


def test_info_that_training_could_not_read_is_named(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "s") as writer:
        writer.write(Record(key="good", images=(jpeg(),), info={}))
        writer.write(Record(key="bad", images=(jpeg(),), info={"captions": "not a list"}))
    (report,) = inspect_data(tmp_path / "s").splits
    assert report.records == 1
    assert [(d.key, d.reason) for d in report.unreadable] == [("bad", "field captions is not a list of texts")]


def test_stored_regions_that_evaluation_would_refuse_are_named(tmp_path: Path) -> None:
    box = np.array([[0, 0, 0.5, 0.5], [0.2, 0.2, 0.9, 0.9]], np.float32)
    good = pack(Detections(box, np.ones((2, 3), np.float16), None))
    empty = pack(Detections(box * 0, np.ones((2, 3), np.float16), None))
    sure = [0.9, 0.8]
    records = {
        "good": ([sure], (good,)),
        "without": (None, ()),
        "pair": ([sure, sure], (good, good)),
        "cut": ([sure], (good[:-40],)),
        "second": ([sure, sure], (good, good[:9])),
        "fewer": ([[0.9]], (good,)),
        "unnamed": (None, (good,)),
        "lost": ([sure], ()),
        "one": ([sure, sure], (good,)),
        "empty": ([sure], (empty,)),
    }
    with ShardWriter(tmp_path / "s") as writer:
        for key, (confidences, parts) in records.items():
            images = (jpeg(),) * (2 if key in ("pair", "second", "one") else 1)
            info = {} if confidences is None else {"confidences": confidences}
            writer.write(Record(key=key, images=images, info=info, detected=parts))
    (report,) = inspect_data(tmp_path / "s").splits
    assert report.records == 3
    reasons = {drop.key: drop.reason for drop in report.unreadable}
    assert reasons.keys() == records.keys() - {"good", "without", "pair"}
    assert "its stored regions: not readable as npz" in reasons["cut"] and "not readable" in reasons["second"]
    assert "2 regions are stored" in reasons["fewer"] and "no detector's regions" in reasons["lost"]


def test_no_shards(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no shards"):
        inspect_data(tmp_path)
    with pytest.raises(UserError, match="no shards"):
        inspect_data(tmp_path / "none")


def test_the_sheet_shows_pictures_and_text(folder: Path) -> None:
    assert inspect_data(folder, sheet=folder / "sheet.png").sheet == folder / "sheet.png"
    sheet = np.asarray(Image.open(folder / "sheet.png").convert("L"), dtype=float)
    picture = sheet[sheets.GAP + 40 : sheets.GAP + 120, sheets.GAP + 10 : sheets.GAP + 80]
    text = sheet[sheets.GAP + sheets.SIDE : sheets.GAP + sheets.SIDE + 20, sheets.GAP : sheets.SIDE]
    assert picture.std() > 10 and text.std() > 10


def test_data_in_a_folder_that_cannot_be_written_are_counted(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "contact-sheet.png").mkdir()
    inspection = inspect_data(folder)
    assert inspection.sheet is None and "contact-sheet.png: cannot write" in inspection.no_sheet
    assert [report.records for report in inspection.splits] == [1, 6]
    show_inspection(inspection)
    assert "no contact sheet" in capsys.readouterr().out
    with pytest.raises(UserError, match="cannot write"):
        inspect_data(folder, sheet=folder / "contact-sheet.png")


def test_a_script_without_a_font_is_noted_and_long_text_cut() -> None:
    latin = frozenset(range(32, 127))
    assert sheets._wrap("a cat\n一只猫在睡觉", latin) == f"a cat\n{sheets.NO_FONT}"
    chinese = latin | {ord(c) for c in "一只猫在睡觉"}
    assert sheets._wrap("一只猫在睡觉", chinese) == "一只猫在睡觉"
    lines = sheets._wrap("word " * 200, latin).splitlines()
    assert len(lines) == sheets.LINES and lines[-1].endswith("…")


def test_text_of_a_record() -> None:
    assert sheets.summary_text({"captions": ["a", "b"], "captions_zh": ["一"]}) == "a\n一"
    assert sheets.summary_text({"statements": [{"text": "so", "label": False}]}) == "so [false]"
    assert sheets.summary_text({"questions": [{"question": "how?", "answers": {"x": 0.3, "y": 1.0}}]}) == "how? [y]"
    assert sheets.summary_text({"captions": [], "label": "cat"}) == "cat"
    assert sheets.summary_text({}) == ""
