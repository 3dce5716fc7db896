"""Splits that cannot be scored, and splits by other names than ours."""

import json
import shutil

import pytest

from fastvlp.cli import main
from fastvlp.data.records.shards import Shards, ShardWriter
from fastvlp.data.splits import find_splits
from fastvlp.errors import UserError
from fastvlp.tasks.task_evaluation import evaluate_task
from fastvlp.tasks.task_scores import format_scores
from fastvlp.training.loop import train
from tests.tasks.tuning import tune

# As published: the answer is missing (VCR, NLVR2), empty (VQA), or there are images alone (COCO's captions).
UNANSWERED = {
    "vqa": ("questions", lambda entry: entry | {"answers": {}}),
    "vcr": ("choices", lambda entry: {k: v for k, v in entry.items() if not k.startswith("right")}),
    "nlvr": ("statements", lambda entry: entry | {"label": None}),
    "retrieval": ("captions", lambda entry: None),
}


def without_answers(world, folder, field, remove_answer):
    """The corpus with a test split that has no answers."""
    for split in ("train", "val"):
        shutil.copytree(world / split, folder / split)
    with ShardWriter(folder / "test") as writer:
        for record in Shards(world / "test"):
            record.info[field] = [remove_answer(entry) for entry in record.info[field]]
            writer.write(record)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("task", UNANSWERED)
def test_a_split_without_answers_is_not_scored(task, runs, world, tmp_path, capsys):
    field, remove_answer = UNANSWERED[task]
    data, out = without_answers(world, tmp_path / "data", field, remove_answer), tmp_path / "run"
    scores, path = tune(task, runs["mlm"], data, out)
    assert scores["val"]["count"] > 0 and scores["test"].keys() == {"not scored"}
    assert json.loads(path.read_text()) == scores
    printed = format_scores(scores)
    assert f" test not scored: {data}/test: no record has {field!r}" in printed and "  val " in printed

    capsys.readouterr()
    assert main(["evaluate", str(out)]) == 2
    error = capsys.readouterr().err
    assert "split 'test'" in error and repr(field) in error
    assert sorted(found.name for found in out.glob("results*")) == ["results.json"]
    assert main(["evaluate", str(out), "--split", "val"]) == 0


@pytest.mark.slow
def test_questions_without_answers_are_left_out_of_the_score_and_counted(runs, world, tmp_path):
    """The score is that of the other questions alone, however the answers are missing."""
    lackings, out = [{"answers": {}}, {"answers": None}, {}], tmp_path / "run"
    few, *halves = folders = [tmp_path / name for name in ("few", "empty", "null", "none")]
    for folder in folders:
        for split in ("train", "val"):
            shutil.copytree(world / split, folder / split)
    total = 0
    with ShardWriter(few / "test") as scored:
        for record in Shards(world / "test"):
            total += len(record.info["questions"])
            record.info["questions"] = record.info["questions"][::2]
            scored.write(record)
    for half, lacking in zip(halves, lackings):
        with ShardWriter(half / "test") as mixed:
            for record in Shards(world / "test"):
                asked = record.info["questions"]
                bare = [{k: v for k, v in entry.items() if k != "answers"} | lacking for entry in asked]
                record.info["questions"] = [pair[k % 2] for k, pair in enumerate(zip(asked, bare))]
                mixed.write(record)
    tuned, _ = tune("vqa", runs["mlm"], halves[0], out)
    known = evaluate_task(str(out), data=str(few)).scores["test"]
    assert known["unanswered"] == 0 and 0 < known["count"] < total
    assert tuned["val"]["unanswered"] == 0
    for scores in (tuned, *(evaluate_task(str(out), data=str(half)).scores for half in halves)):
        assert scores["test"]["unanswered"] == total - known["count"]
        for name, value in known.items():
            if name not in ("unanswered", "data"):
                assert scores["test"][name] == pytest.approx(value), name
        assert f" test unanswered               {total - known['count']:.0f}\n" in format_scores(scores) + "\n"


def test_a_question_with_a_fault_is_refused_all_the_same(runs, world, tmp_path):
    data = tmp_path / "data"
    for split in ("train", "val"):
        shutil.copytree(world / split, data / split)
    with ShardWriter(data / "test") as writer:
        for record in Shards(world / "test"):
            record.info["questions"][0] = {"question": "what is it?", "answers": ["yes"]}
            writer.write(record)
    with pytest.raises(UserError, match=r"leaves none out"):
        tune("vqa", runs["mlm"], data, tmp_path / "run")


@pytest.mark.parametrize(
    "task",
    [
        *("vqa", "grounding", "retrieval"),
        *(pytest.param(task, marks=pytest.mark.slow) for task in ("nlvr", "nlvr2", "entailment", "vcr")),
    ],
)
def test_scores_come_with_chance_and_uncertainty(task, runs, world, tmp_path):
    scores, _ = tune(task, runs["uniter" if task in ("grounding", "vcr") else "mlm"], world, tmp_path / "run", steps=1)
    assert 0 < scores["test"]["chance"] < 1 and 0 <= scores["test"]["standard_error"] < 0.5


def test_scores_are_kept_where_the_next_split_cannot_be_read(runs, world, tmp_path, monkeypatch):
    """A damaged split is found before training; one that is damaged later still leaves the scores of the others."""
    data, out = tmp_path / "data", tmp_path / "run"
    for split in ("train", "val", "test"):
        shutil.copytree(world / split, data / split)
    tar = data / "test" / "00000.tar"
    whole = tar.read_bytes()
    tar.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="leaves none out"):
        tune("vqa", runs["mlm"], data, out)
    assert not (out / "last.safetensors").exists()
    tar.write_bytes(whole)

    def train_and_damage(*args, **options):
        train(*args, **options)
        tar.write_bytes(whole[: len(whole) // 2])

    monkeypatch.setattr("fastvlp.tasks.finetune.train", train_and_damage)
    with pytest.raises(UserError, match="leaves none out"):
        tune("vqa", runs["mlm"], data, tmp_path / "later")
    out = tmp_path / "later"
    assert json.loads((out / "results.json").read_text()).keys() == {"val"}


def test_weights_are_not_chosen_by_a_split_without_answers(runs, world, tmp_path):
    data = without_answers(world, tmp_path / "data", *UNANSWERED["vqa"])
    shutil.rmtree(data / "val")
    (data / "test").rename(data / "val")
    with pytest.raises(UserError, match=r"val: no record has 'questions' with 'answers'.*chooses the weights"):
        tune("vqa", runs["mlm"], data, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_published_splits_are_scored_by_their_names(runs, world, tmp_path, capsys):
    data, out = tmp_path / "data", tmp_path / "run"
    for name, split in {"train": "train", "dev": "val", "testA": "test", "testB": "val"}.items():
        shutil.copytree(world / split, data / name)
    scores, _ = tune("grounding", runs["uniter"], data, out)
    assert scores.keys() == {"val"}, "neither testA nor testB is all of the test"
    for name, count in (("testA", "test"), ("testB", "val"), ("dev", "val")):
        scores = evaluate_task(str(out), split=name).scores
        assert scores[name]["data"] == str(data / name)
        assert scores == evaluate_task(str(out), split=name, data=str(data)).scores
        assert scores[name]["count"] == sum(len(record.info["expressions"]) for record in Shards(world / count))
    assert json.loads((out / "results-2.json").read_text()).keys() == {"testA"}
    assert main(["evaluate", str(out), "--split", "testA"]) == 0
    capsys.readouterr()
    assert main(["evaluate", str(out), "--split", "testC"]) == 2
    assert f"{data}: no split called testC" in capsys.readouterr().err


def test_test1_is_the_test_where_there_is_no_other(runs, world, tmp_path):
    data, out = tmp_path / "data", tmp_path / "run"
    for name, split in {"train": "pairs-train", "dev": "pairs-val", "test1": "pairs-test"}.items():
        shutil.copytree(world / split, data / name)
    scores, _ = tune("nlvr2", runs["uniter"], data, out)
    assert scores["test"] == evaluate_task(str(out), split="test1").scores["test1"]
    assert scores["test"] == evaluate_task(str(out), split="test", data=str(data)).scores["test"]
    (data / "test").mkdir()
    assert find_splits(str(data))["test"] == str(data / "test")


@pytest.mark.slow
def test_a_run_is_resumed_where_a_test_split_has_come(runs, world, tmp_path):
    data, out = tmp_path / "data", tmp_path / "run"
    for split in ("train", "val"):
        shutil.copytree(world / split, data / split)
    tune("vqa", runs["mlm"], data, out)
    shutil.copytree(world / "test", data / "test1")
    scores, _ = tune("vqa", runs["mlm"], data, out, resume=True)
    assert scores.keys() == {"val", "test"} and evaluate_task(str(out)).scores["test"] == scores["test"]


def test_a_note_on_all_splits_is_printed_once():
    printed = format_scores({split: {"cider": 0.5, "note": "words are split"} for split in ("val", "test")})
    assert printed.count("words are split") == 1 and printed.count("cider") == 2
