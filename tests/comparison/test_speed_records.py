"""Speed records: those of the repository, and measuring one again."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from fastvlp import provenance
from fastvlp.cli import main
from fastvlp.comparison import speed_records
from fastvlp.comparison.results import ArmRun, Comparison, Measurement, TrainingCost
from fastvlp.comparison.speed_records import SpeedRecord, find_data, measure, read_record, verify_record
from fastvlp.config import to_json
from fastvlp.data.records.shards import Shards
from fastvlp.data.world.corpus import WorldConfig, write_world
from fastvlp.errors import UserError
from fastvlp.eval.t_test import p_above
from fastvlp.recipes import names

RECORDS = Path(__file__).parents[2] / "records"
FILES = sorted(RECORDS.glob("*.json"))
RECORD = SpeedRecord(
    recipe="mlm_demo", changed="the first", data="easy", track="steps", budget="40steps", score="cloze", target=0.5
)


def mark(share: float, score: float) -> Measurement:
    spent = TrainingCost(time=80 * share, steps=round(40 * share))
    return Measurement(share=share, spent=spent, scores={"cloze": score})


def measured_comparison(folder: Path, finals: list[float], **more: Any) -> Comparison:
    runs = [
        ArmRun(arm="mlm_demo", seed=i, marks=[mark(0.5, 0.4), mark(1.0, final)], contents={"train": "12", "val": "34"})
        for i, final in enumerate(finals)
    ]
    return Comparison(
        arms=["mlm_demo"], reference="mlm_demo", budget_s=40, seeds=len(runs), shares=[0.5, 1.0],
        about={"date": "2026-11-30 12:00", "commit": "abc", "device": "Some Processor, 2 cores"}, settings={}, configs={},
        runs=runs, folder=folder, counted="steps", **more,
    )  # fmt: skip


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[dict[str, Any]]:
    """Measures nothing: finals of 0.6 ± 0.01. Returns the options with which a comparison is begun."""
    found: list[dict[str, Any]] = []

    def compared(recipes: list[str], **options: Any) -> Comparison:
        found.append({"recipes": recipes, **options})
        return measured_comparison(tmp_path / "out", [0.59, 0.6, 0.61])

    monkeypatch.setattr(speed_records, "compare", compared)
    monkeypatch.setattr(speed_records, "write_world", lambda folder, config, **counts: None)
    return found


def write(folder: Path, record: SpeedRecord) -> Path:
    path = folder / "record.json"
    path.write_text(json.dumps(to_json(record)))
    return path


def test_a_record_is_measured_by_a_comparison_of_its_recipe(calls, tmp_path):
    file = write(tmp_path, replace(RECORD, settings=("vocab=99",), scoring={"cloze_items": 7}, threads=2))
    (tmp_path / "easy").mkdir()
    verified = verify_record(file, data=str(tmp_path / "easy"), out=tmp_path / "out")
    (call,) = calls
    assert call["marks"] == (0.25, 0.5, 0.75, 1.0)
    assert (
        call["recipes"] == ["mlm_demo"] and call["budget"] == "40steps" and call["seeds"] == 3 and call["threads"] == 2
    )
    assert call["set"] == [
        "vocab=99", f"data.train={tmp_path / 'easy/train'}", f"data.val={tmp_path / 'easy/val'}", "device=auto"
    ]  # fmt: skip
    assert (call["scoring"].cloze_items, call["scoring"].scores, call["scoring"].pictures) == (7, ("cloze",), 0)
    measured = verified.measured
    assert [run.final for run in measured.runs] == [0.59, 0.6, 0.61] and measured.value == 40
    assert measured.runs[1].reached_steps == 30 and measured.runs[1].reached_time == 60
    assert measured.p == p_above([0.59, 0.6, 0.61], 0.5) and measured.met
    assert file.read_text() == json.dumps(to_json(verified.record)), "a record is written where that is asked for alone"


def test_the_exit_code_says_whether_the_target_is_met(calls, tmp_path, capsys):
    for target, code in ((0.5, 0), (0.59, 1), (0.7, 1)):
        file = write(tmp_path, replace(RECORD, target=target))
        assert main(["records", "verify", str(file), "--out", str(tmp_path / "out")]) == code
        said = capsys.readouterr().out
        assert ("not met" in said) == bool(code) and "60.0" in said


def test_a_seed_that_failed_or_has_no_score_is_no_record(tmp_path):
    comparison = measured_comparison(tmp_path, [0.59, 0.6, 0.61])
    assert measure(RECORD, comparison).met
    comparison.runs[1].failure = "not finite"
    assert not measure(RECORD, comparison).met
    other = measure(replace(RECORD, score="vqa"), comparison)
    assert not other.met and other.runs[0].failure is not None


def test_what_was_measured_is_written_with_its_log(calls, tmp_path, monkeypatch):
    monkeypatch.setattr(speed_records, "contents_of", lambda recipe, settings: {"train": "12", "val": "34"})
    file = write(tmp_path, RECORD)
    verify_record(file, out=tmp_path / "out", write=True)
    record = read_record(file)
    assert record.met and record.device == "Some Processor, 2 cores" and record.contents == {"train": "12", "val": "34"}
    assert record.log == "logs/record.json" and len(Comparison.load(tmp_path / record.log).runs) == 3
    again = verify_record(file, out=tmp_path / "out")
    assert asdict(replace(again.measured, log=record.log)) == asdict(record)


def test_data_are_checked_before_anything_is_trained(calls, tmp_path):
    write_world(tmp_path / "data", WorldConfig(), train=12, val=4, test=0, pairs=0, singles=0)
    contents = {split: Shards(tmp_path / "data" / split).content for split in ("train", "val")}
    file = write(tmp_path, replace(RECORD, contents=contents | {"val": "34"}))
    with pytest.raises(UserError, match="not the data on which"):
        verify_record(file, data=str(tmp_path / "data"), out=tmp_path / "out")
    assert not calls
    file = write(tmp_path, replace(RECORD, contents=contents))
    with pytest.raises(UserError, match="not the data on which"):
        verify_record(file, data=str(tmp_path / "data"), out=tmp_path / "out")
    assert len(calls) == 1, "what the stand-in says that it read is other data"


def test_a_target_that_is_not_met_is_not_written(calls, tmp_path):
    file = write(tmp_path, replace(RECORD, target=0.7))
    before = file.read_text()
    with pytest.raises(UserError, match=r"not met.*0\.5900"):
        verify_record(file, out=tmp_path / "out", write=True)
    assert file.read_text() == before and not (tmp_path / "logs").exists()


def test_a_measurement_of_other_code_is_not_continued(calls, tmp_path):
    file, out = write(tmp_path, RECORD), tmp_path / "out"
    out.mkdir()
    earlier = measured_comparison(out, [0.6, 0.6])
    earlier.save(out / "results.json")
    with pytest.raises(UserError, match=r"other code \(commit abc, not .*`out`"):
        verify_record(file, out=out)
    earlier.about |= provenance.code()
    earlier.continued = [provenance.code() | {"torch": "0.1"}]
    earlier.save(out / "results.json")
    with pytest.raises(UserError, match=r"torch 0\.1, not"):
        verify_record(file, out=out)
    assert not calls
    earlier.continued = []
    earlier.save(out / "results.json")
    verify_record(file, out=out)
    assert calls[0]["resume"]


def test_a_corpus_is_written_where_it_is_missing_by_default_alone(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    written: list[Path] = []
    monkeypatch.setattr(speed_records, "write_world", lambda folder, config, **counts: written.append(folder))
    own = tmp_path / "own"
    with pytest.raises(UserError, match="no such folder"):
        find_data(RECORD, str(own))
    own.mkdir()
    assert find_data(RECORD, str(own)) == own and not written
    assert find_data(RECORD, None) == Path("easy") and written == [Path("easy")]
    for complete, times in ((False, 2), (True, 2)):
        Path("easy").mkdir(exist_ok=True)
        Path("easy/corpus.json").write_text(json.dumps({"counts": {"train": 7}, "complete": complete}))
        find_data(RECORD, None)
        assert len(written) == times


def test_records_that_cannot_be(calls, tmp_path):
    for wrong in ({"budget": "40s"}, {"track": "cpu2"}, {"track": "cpu2", "budget": "40s", "threads": 3}):
        with pytest.raises(UserError):
            replace(RECORD, **wrong)
    file = tmp_path / "record.json"
    for text in ("[", json.dumps({"recipe": "mlm_demo"}), json.dumps({**asdict(RECORD), "track": "moon"})):
        file.write_text(text)
        with pytest.raises(UserError, match=r"record\.json"):
            read_record(file)
    with pytest.raises(UserError, match="`seeds`"):
        verify_record(write(tmp_path, RECORD), seeds=1)
    with pytest.raises(UserError, match="`data`"):
        verify_record(write(tmp_path, replace(RECORD, data="flickr8k")), data=str(tmp_path / "nowhere"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_record_of_the_repository_is_met_and_its_table_says_what_its_file_says(file):
    record = read_record(file)
    assert record.met and record.recipe in names() and len(record.runs) >= 2
    comparison = Comparison.load(file.parent / str(record.log))
    assert asdict(measure(record, comparison)) == asdict(record)
    rows = [line for line in (RECORDS / "README.md").read_text("utf-8").splitlines() if f"({file.name})" in line]
    (cells,) = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    unit = "steps" if record.track == "steps" else "s"
    assert f"{record.value:,.0f} {unit}" in cells and record.date in cells
    mean = sum(run.final for run in record.runs) / len(record.runs)
    assert any(re.match(rf"{100 * mean:.1f}\b", cell) for cell in cells)
