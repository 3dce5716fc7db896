"""Results of evaluations: a file for each data set, to which results are added; the list of evaluations and their help."""

from __future__ import annotations

import json
import shutil

import pytest

from fastvlp.cli import COMMANDS, main
from fastvlp.errors import UserError
from fastvlp.eval.evaluation import Evaluation, add_result, check_above_chance, evaluate_embeddings, evaluations


def test_data_sets_are_kept_apart_and_results_added(tmp_path):
    run, first, second = tmp_path / "run", tmp_path / "a/set/test", tmp_path / "b/set/test"
    paths = [add_result(run, "retrieval", str(data), {"n": n}) for n, data in enumerate((first, second, first, second))]
    assert [path.name for path in paths] == ["retrieval-set-test.json", "retrieval-set-test-2.json"] * 2
    contents = [json.loads(path.read_text()) for path in paths[:2]]
    assert [t["data"] for t in contents] == [str(first), str(second)]
    assert [[r["n"] for r in t["results"]] for t in contents] == [[0, 2], [1, 3]]
    assert add_result(run, "probe", str(first), {}).name == "probe-set-test.json"
    assert add_result(run, "probe", "s3://bucket/数据/val/", {}).name == "probe-数据-val.json"
    with pytest.raises(UserError, match=r"retrieval-set-test\.json: "):
        paths[0].write_text("{}")
        add_result(run, "retrieval", str(first), {})


def test_each_evaluation_is_a_command():
    assert {f"evaluate {name}" for name in evaluations()} == {
        name for name in COMMANDS if name.startswith("evaluate ") and name != "evaluate task"
    }


@pytest.mark.parametrize(
    ("name", "options", "named"), [("retreival", {}, "retrieval"), ("probe", {"lable": "x"}, "label")]
)
def test_a_wrong_name_or_option_is_answered_with_the_nearest(name, options, named):
    with pytest.raises(UserError, match=rf"{[*options, name][0]}.*\b{named}\b"):
        evaluate_embeddings(name, "run", data="data", **options)


@pytest.mark.parametrize("command", evaluations())
def test_help_lists_the_shared_options_too(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["evaluate", command, "--help"])
    assert not stopped.value.code
    assert {"--data", "--batch-size", "--device"} <= {*capsys.readouterr().out.replace("│", " ").split()}


@pytest.mark.parametrize(("recall", "error"), [(0.012, 0.001), (0.03, 0.005), (0.01, 0.0)])
def test_a_recall_that_is_not_clearly_above_chance_is_refused(recall, error):
    found = {"counts": {}, "data": "d", "weights": "w", "step": 1, "chance": {"recall": 0.01}}
    for value, refused in ((recall, True), (0.2, False)):
        result = Evaluation(scores={"towers": {"recall": value}}, errors={"towers": {"recall": error}}, **found)
        if refused:
            with pytest.raises(UserError, match=r"chance 1\.00%"):
                check_above_chance(result)
        else:
            check_above_chance(result)


def test_the_result_is_saved_before_it_is_refused(runs, world, tmp_path):
    """The runs of the tests have learned nothing."""
    run = shutil.copytree(runs["both"], tmp_path / "run", ignore=shutil.ignore_patterns("evaluations"))
    with pytest.raises(UserError, match="has not learned to retrieve"):
        evaluate_embeddings("retrieval", run, data=str(world), split="val", above_chance=True)
    (path,) = run.glob("evaluations/*.json")
    assert len(json.loads(path.read_text())["results"]) == 1
