"""Zero-shot classification: the formulas against a loop, the files, and a run from the command line."""

from __future__ import annotations

import json
import math

import pytest
import torch
import torch.nn.functional as F

from fastvlp.cli import main
from fastvlp.data.records.shards import Shards
from fastvlp.errors import UserError
from fastvlp.eval.class_files import PROMPTS, read_classes, read_templates
from fastvlp.eval.classification import accuracy_by_class, class_ranks, class_scores
from fastvlp.eval.zeroshot import class_vectors, evaluate_zeroshot
from fastvlp.model.saving import load_model


def unit(*shape, seed=0):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_a_class_is_the_mean_of_its_texts():
    text, class_of_text = unit(7, 5), torch.tensor([0, 0, 2, 1, 2, 2, 2])
    found = class_vectors(text, class_of_text, 3)
    for c in range(3):
        torch.testing.assert_close(found[c], F.normalize(text[class_of_text == c].mean(0), dim=0))


def test_scores_against_a_loop():
    score = torch.randn(60, 8, generator=torch.Generator().manual_seed(1))
    label = torch.arange(60) % 7  # class 7 does not occur
    best = score.argsort(1, descending=True)
    rank = class_ranks(score, label)
    found = class_scores(rank, label, 8)
    hits = [int(row[0]) == int(its) for row, its in zip(best, label)]
    assert found["top1"] == pytest.approx(sum(hits) / 60)
    assert found["top5"] == pytest.approx(sum(int(its) in row[:5].tolist() for row, its in zip(best, label)) / 60)
    by_class = [sum(h for h, its in zip(hits, label) if its == c) / int((label == c).sum()) for c in range(7)]
    assert found["mean_per_class"] == pytest.approx(sum(by_class) / 7)
    assert accuracy_by_class(rank, label, 8)[:7].tolist() == pytest.approx(by_class)
    assert "top5" not in class_scores(rank.clamp(max=5), label % 5, 5), "five of five is no score"


def test_ties_and_nan_are_no_hits():
    label = torch.arange(4)
    for value in (0.0, math.nan):
        assert class_ranks(torch.full((4, 4), value), label).tolist() == [4, 4, 4, 4]


def test_class_files(tmp_path):
    (tmp_path / "c.txt").write_text("\ufeffred  circle\n\n红色圆\n", encoding="utf-8")
    assert read_classes(tmp_path / "c.txt") == {"red circle": ["red circle"], "红色圆": ["红色圆"]}
    (tmp_path / "c.json").write_text('{"n01": "tench", "n02": ["crane", "crane bird"]}')
    assert read_classes(tmp_path / "c.json") == {"n01": ["tench"], "n02": ["crane", "crane bird"]}


@pytest.mark.parametrize(
    ("name", "text", "part"),
    [
        ("c.txt", "a\nb\n\na\n", r"c\.txt:4: class 'a' .* line 1"),
        ("c.txt", "\n \n", r"c\.txt: no class"),
        ("c.json", '{"a": "x",\n "b": "y",\n "a": "z"}', r"c\.json:3: class 'a'"),
        ("c.json", "{}", "no class in it"),
        ("c.json", '["a"]', "no class in it"),
        ("c.json", '{"a": "x"', "not JSON .*line 1"),
        ("c.json", '{"a": []}', r"class 'a' has \[\]"),
        ("c.json", '{"a": ["x", 3]}', "class 'a' has"),
        ("missing.txt", None, "cannot read"),
    ],
)
def test_class_files_that_cannot_be_used(name, text, part, tmp_path):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=part):
        read_classes(tmp_path / name)


def test_templates(tmp_path):
    sizes = {path.stem: len(read_templates(path.stem)) for path in PROMPTS.glob("*.txt")}
    assert sizes == {"simple": 1, "flip7": 7, "openai80": 80, "zh7": 7}
    assert {*read_templates("flip7")} < {*read_templates("openai80")}
    assert len({*read_templates("openai80")}) == 80
    assert read_templates("simple") == ["{}"]
    mine = tmp_path / "mine.txt"
    mine.write_text("a {} in braces { }\n\nthe {}.\n")
    assert read_templates(str(mine)) == ["a {} in braces { }", "the {}."]
    for text, part in (("a {}\nno slot\n", r"mine\.txt:2: 'no slot'"), ("{} and {}", ":1: "), ("\n", "no template")):
        mine.write_text(text)
        with pytest.raises(UserError, match=part):
            read_templates(str(mine))
    with pytest.raises(UserError, match="flip7, openai80, simple, zh7"):
        read_templates("openai")


def test_a_run_is_scored_from_the_command_line(runs, world, tmp_path, capsys):
    data = str(world / "singles-test")
    labels = sorted({record.info["label"] for record in Shards(data)})
    (tmp_path / "c.txt").write_text("\n".join([*labels, "another class"]))
    argv = ["evaluate", "zeroshot", str(runs["both"]), "--data", data]
    assert main([*argv, "--classes", str(tmp_path / "c.txt"), "--templates", "simple"]) == 0
    assert main([*argv, "--keep", "0.5", "--views", "2"]) == 0
    printed = capsys.readouterr().out
    assert "mean_per_class" in printed and f"classes {len(labels) + 1}" in printed and "templates 7" in printed
    assert "chance" in printed and f"{100 / (len(labels) + 1):.2f} %" in printed
    (path,) = (runs["both"] / "evaluations").glob("zeroshot-*.json")
    assert str(path) in printed
    content = json.loads(path.read_text())
    first, second = content["results"]
    assert content["data"] == data and first["settings"]["templates"] == "simple" and second["settings"]["views"] == 2
    assert first["counts"]["images"] == len(Shards(data)) and set(first["by_class"]) == {*labels}
    scores = first["scores"]["zero-shot"]
    by_function = evaluate_zeroshot(runs["both"], data=data, classes=tmp_path / "c.txt", templates="simple")
    assert scores == by_function.scores["zero-shot"]


@pytest.fixture
def names(runs, world):
    """{label: name}, each in two characters that the run has learned: English words are all unknown to it."""
    tokenizer = load_model(runs["both"]).tokenizer
    unknown = tokenizer.encode(["unknown"], 9)[0][0, 1]
    known = [char for char in "红黄绿蓝紫圆形方在的" if tokenizer.encode([char], 9)[0][0, 1] != unknown]
    labels = sorted({record.info["label"] for record in Shards(world / "singles-test")})
    spelt = [a + b for a in known for b in known]
    return dict(zip(labels, spelt, strict=False))


def scored(runs, world, path, names):
    path.write_text(json.dumps(names))
    return evaluate_zeroshot(runs["both"], data=world / "singles-test", classes=path)


def test_names_decide_and_not_their_order(runs, world, tmp_path, names):
    found = scored(runs, world, tmp_path / "c.json", names)
    again = scored(runs, world, tmp_path / "c.json", dict(reversed(names.items())))
    assert found.scores["zero-shot"] == pytest.approx(again.scores["zero-shot"])
    assert found.details["by_class"] == again.details["by_class"] and found.counts["classes_like_another"] == 0
    assert found.scores["zero-shot"]["top5"] > 0


def test_classes_that_the_model_cannot_tell_apart_are_counted_and_never_right(runs, world, tmp_path, names):
    alike = [*names][:3]
    found = scored(runs, world, tmp_path / "c.json", names | dict.fromkeys(alike, "unknown"))
    assert found.counts["classes_like_another"] == 3
    assert [found.details["by_class"][label] for label in alike] == [0, 0, 0]


def test_an_unknown_label_is_named_with_the_nearest(runs, world, tmp_path):
    (tmp_path / "c.txt").write_text("red circles\nblue ring\n")
    with pytest.raises(UserError, match=r"c\.txt: .*'red circle'.*single.*red circles"):
        evaluate_zeroshot(runs["both"], data=world / "singles-test", classes=tmp_path / "c.txt")
