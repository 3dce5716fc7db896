"""A run that was stopped continues on another number of ranks, with the same rows in each step."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from fastvlp.errors import UserError
from fastvlp.model.saving import load_model
from fastvlp.training.checkpoint import load_checkpoint
from fastvlp.training.division import Division, divide
from fastvlp.training.loop import train
from fastvlp.training.part_files import FOLDERS
from fastvlp.training.train_config import check
from tests.processes import on_ranks
from tests.training.families import FAMILIES, family_run, made_world, train_all
from tests.training.runs import assert_equal

# Ten processes on one core take long to start.
pytestmark = pytest.mark.timeout(1200)
# Words, pairs and a queue, each in some of the ways; every family in every way takes minutes: FASTVLP_LONG_TESTS=1.
WHOLE = "FASTVLP_LONG_TESTS" in os.environ
MOVED = (*FAMILIES,) if WHOLE else ("flm_demo", "brivl_demo")
SHARDED = (*FAMILIES,) if WHOLE else ("flm_demo", "flip_demo")
CUT = ("flm_demo", "flip_demo") if WHOLE else ("flm_demo",)
# Averaged weights; a queue and a momentum copy.
UNITED = ("flip_demo", "brivl_demo") if WHOLE else ("flip_demo",)
DIVIDED = ("flip_demo", "brivl_demo") if WHOLE else ("brivl_demo",)
CONTINUED = [*((name, "moved") for name in MOVED), *((name, "sharded") for name in SHARDED)]
CROSSED = [*((name, "united") for name in UNITED), *((name, "divided") for name in DIVIDED)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """One process group of each size for all runs: starting one takes longer than they do."""
    folder = tmp_path_factory.mktemp("ranks")
    world = made_world(folder / "world")
    for name in dict.fromkeys((*MOVED, *SHARDED)):
        train(family_run(name, world, folder / "one", accumulate=4))
    for name in CUT:
        train(family_run(name, world, folder / "cut", batch_size=8, accumulate=2, steps=1))
    for name in DIVIDED:
        train(family_run(name, world, folder / "divided", accumulate=4, steps=1))
    moved = [family_run(name, world, folder / "moved") for name in MOVED]
    sharded = [family_run(name, world, folder / "sharded", shard=True) for name in SHARDED]
    united = [family_run(name, world, folder / "united", shard=True) for name in UNITED]
    divided = [family_run(name, world, folder / "divided", accumulate=4, shard=True) for name in DIVIDED]
    # 2 micro-batches of 8 rows become 4 of 4.
    cut = [family_run(name, world, folder / "cut", batch_size=8, accumulate=2) for name in CUT]
    on_ranks(4, train_all, [replace(run, steps=1) for run in (*moved, *sharded, *united)])
    on_ranks(2, train_all, [*moved, *sharded, *divided], True)
    on_ranks(4, train_all, cut, True)
    train_all([replace(run, shard=False) for run in united], True)
    return folder


def losses(run: Path) -> list[list[float]]:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    names = ("loss", "grad_norm")
    return [[x for name, x in line.items() if name.startswith(names)] for line in lines if line["kind"] == "train"]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "how"), CONTINUED)
def test_a_run_that_stopped_on_four_ranks_continues_on_two(folder, name, how):
    """Two, of which each has all weights, or a part of them."""
    assert_same_run(folder / "one" / name, folder / how / name)
    saved = load_checkpoint(folder / how / name / "last.pt")
    assert (saved["ranks"], saved["batches"], saved["step"]) == (4, 3, 3)


@pytest.mark.slow
def test_each_rank_writes_its_own_parts(folder):
    """And nobody all of them: the main rank has the weights alone, a third or a fourth of what is saved."""
    (parts,) = (
        folder / "sharded" / "flip_demo" / name
        for name in FOLDERS
        if (folder / "sharded" / "flip_demo" / name).exists()
    )
    sizes = [path.stat().st_size for path in parts.iterdir()]
    assert len(sizes) == 2 and max(sizes) < 1.3 * min(sizes)
    assert (parts.parent / "last.pt").stat().st_size < min(sizes) / 2
    # What went on without `shard` has one file again.
    assert not any((folder / "united" / "flip_demo" / name).exists() for name in FOLDERS)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "how"), CROSSED)
def test_weights_are_divided_and_united_when_a_run_continues(folder, name, how):
    assert_same_run(folder / "one" / name, folder / how / name)


def assert_same_run(one: Path, other: Path) -> None:
    then, now = (load_checkpoint(run / "last.pt") for run in (one, other))
    assert_equal(now["pretraining"], then["pretraining"], 2e-6)
    assert now["pairs"] == then["pairs"] and now["best"] == pytest.approx(then["best"], rel=1e-5)
    assert now["groups"] == then["groups"] and (now["ema"] is None) == (then["ema"] is None)
    if now["ema"] is not None:
        assert_equal(now["ema"], then["ema"], 2e-6)
    for i, moments in then["optimiser"]["state"].items():
        assert_equal(now["optimiser"]["state"][i], moments, 1e-5)
    for name in ("best", "last") if (one / "best.safetensors").exists() else ("last",):
        models = [load_model(run, name) for run in (one, other)]
        assert_equal(models[1].model.state_dict(), models[0].model.state_dict(), 2e-6)
        assert_equal(models[1].objectives, models[0].objectives, 2e-6)
    for before, after in zip(losses(one), losses(other), strict=True):
        assert after == pytest.approx(before, rel=1e-5, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", CUT)
def test_micro_batches_are_cut_for_more_ranks(folder, name):
    one, cut = (load_checkpoint(folder / count / name / "last.pt") for count in ("one", "cut"))
    assert (cut["ranks"], cut["batches"], cut["pairs"]) == (1, 6, 48)
    assert_equal(cut["pretraining"], one["pretraining"], 2e-6)


@pytest.mark.parametrize(
    ("began", "accumulate", "ranks", "division"),
    [
        (4, 1, 4, Division(4, 1)),
        (4, 1, 2, Division(4, 2)),
        (8, 3, 6, Division(8, 4)),
        (4, 1, 8, Division(4, 1, 2)),
        (4, 1, 3, Division(4, 4, 3)),
        (1, 2, 12, Division(1, 1, 6)),
    ],
)
def test_a_step_is_divided_into_whole_micro_batches_where_it_can_be(tmp_path, began, accumulate, ranks, division):
    run = family_run("mlm_demo", tmp_path, tmp_path, batch_size=12, accumulate=accumulate)
    assert divide(run, began, ranks) == division
    assert division.micro * ranks == accumulate * began * division.cut


@pytest.mark.parametrize("option", ["compile", "muon"])
def test_what_does_not_work_with_divided_weights_is_refused(tmp_path, option):
    run = family_run("mlm_demo", tmp_path, tmp_path, shard=True)
    check(run)
    other = (
        replace(run, compile=True) if option == "compile" else replace(run, optim=replace(run.optim, matrices="muon"))
    )
    with pytest.raises(UserError, match=rf"{option}.*`shard`"):
        check(other)


@pytest.mark.parametrize(("name", "batch_size"), [("mlm_demo", 8), ("uniter_demo", 12)])
def test_ranks_that_cannot_share_a_step_are_refused(tmp_path, name, batch_size):
    run = family_run(name, tmp_path, tmp_path, batch_size=batch_size)
    with pytest.raises(UserError, match=r"began on 4 ranks.*3 ranks cannot share.*`ranks` in `change`"):
        divide(run, 4, 3)
