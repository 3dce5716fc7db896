"""A run goes on with data that moved, and with other values where the user names them."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from fastvlp.data.batching import Grouping, Lengths
from fastvlp.data.loader import Loader
from fastvlp.data.records.shards import Shards, ShardWriter
from fastvlp.errors import UserError
from fastvlp.objectives.superclip import SuperCLIPConfig
from fastvlp.training.checkpoint import load_checkpoint, save_checkpoint
from fastvlp.training.loop import start, train
from tests.training.runs import assert_equal, made_pairs, made_records, made_run, weights


@pytest.fixture
def pairs(tmp_path):
    return made_pairs(tmp_path / "pairs")


def with_data(run, **changes):
    return replace(run, data=replace(run.data, **changes))


def test_data_are_recognised_by_content(pairs, tmp_path):
    run = made_run(pairs, tmp_path / "a", "mlm", steps=1)
    train(run)
    # Copied elsewhere, cut into other tars, with new times.
    for split in ("train", "val"):
        with ShardWriter(tmp_path / "moved" / split, per_shard=7) as writer:
            for record in Shards(pairs / split):
                writer.write(record)
    shutil.rmtree(pairs)
    moved = with_data(run, train=str(tmp_path / "moved/train"), val=str(tmp_path / "moved/val"))
    assert start(moved, resume=True).changed == {}


def test_a_moved_run_ends_with_the_weights_of_the_straight_one(pairs, tmp_path):
    run = made_run(pairs, tmp_path / "a", "mlm")
    straight = train(replace(run, out=str(tmp_path / "b")))
    stopped = replace(run, checkpoint_every=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastvlp.training.loop.log_dropped", stop_at(4))
        with pytest.raises(KeyboardInterrupt):
            train(stopped)
    shutil.copytree(pairs, tmp_path / "copy")
    shutil.rmtree(pairs)
    moved = with_data(stopped, train=str(tmp_path / "copy/train"), val=str(tmp_path / "copy/val"))
    assert_equal(weights(train(moved, resume=True)), weights(straight))


def stop_at(step):
    def stop(state, dropped, log):
        if state.step == step:
            raise KeyboardInterrupt

    return stop


def test_other_records_are_refused_unless_named(pairs, tmp_path):
    run = made_run(pairs, tmp_path / "a", "mlm", steps=2)
    train(run)
    with ShardWriter(tmp_path / "other") as writer:
        for record in made_records(24, seed=9):
            writer.write(record)
    other = with_data(replace(run, steps=4), train=str(tmp_path / "other"))
    with pytest.raises(UserError, match=r"data\.train"):
        train(other, resume=True)
    assert train(other, resume=True, change=["data.train"]).step == 4
    # The same place with other records.
    shutil.rmtree(tmp_path / "other")
    with ShardWriter(tmp_path / "other") as writer:
        for record in made_records(20, seed=5):
            writer.write(record)
    with pytest.raises(UserError, match=r"data\.train.* other records"):
        train(replace(other, steps=6), resume=True)


def test_another_batch_size_and_rate_go_on_where_the_run_stood(pairs, tmp_path):
    run = made_run(pairs, tmp_path / "a", "mlm", steps=3)  # 24 rows: one epoch
    train(run)
    changed = replace(
        with_data(run, batch_size=5), steps=6, accumulate=2, optim=replace(run.optim, lr=1e-3, betas=(0.8, 0.9))
    )
    with pytest.raises(UserError, match=r"accumulate: 1 then, 2 now.*optim\.lr: 0\.01 then, 0\.001 now"):
        train(changed, resume=True, change=["data.batch-size"])
    names = ["data.batch-size", "accumulate", "optim.lr", "optim.betas"]
    state = start(changed, resume=True, change=names)
    assert state.step == 3 and state.batches == 5 and state.optimiser.param_groups[0]["betas"] == (0.8, 0.9)
    assert {group["base_lr"] for group in state.optimiser.param_groups} <= {1e-3, 5e-3}
    assert {*state.changed} == {"data.batch_size", "accumulate", "optim.lr", "optim.betas"}
    end = train(changed, resume=True, change=names)
    assert end.step == 6 and end.batches == 5 + 3 * 2
    # Resumed once more, it goes on from there and not from a count of steps.
    assert start(replace(changed, steps=9), resume=True).batches == 11


def test_a_name_that_no_run_has_is_refused(pairs, tmp_path):
    run = made_run(pairs, tmp_path / "a", "mlm", steps=1)
    train(run)
    with pytest.raises(UserError, match=r"data\.batch_siz.*data\.batch_size"):
        train(replace(run, steps=2), resume=True, change=["data.batch_siz"])


def test_an_average_may_begin_later(pairs, tmp_path):
    run = made_run(pairs, tmp_path / "a", "mlm", steps=2)
    before = weights(train(run))
    state = start(replace(run, steps=4, ema=0.9), resume=True, change=["ema"])
    assert_equal(dict(state.ema.module.state_dict()), before)


@pytest.mark.parametrize("grouping", [None, Grouping(group=8), Grouping(group=8, max_tokens=20, multiple=1)])
def test_a_batch_is_found_by_the_rows_before_it(grouping):
    tokens = torch.arange(2, 9).repeat(3)
    lengths = Lengths(tokens.numpy(), np.arange(len(tokens) + 1))

    def loader_of(rank: int) -> Loader:
        return Loader(21, None, batch_size=2, seed=0, rank=rank, world=2, grouping=grouping, lengths=lambda: lengths)

    loader, before = loader_of(0), 0
    for s in range(14):
        assert loader.place(s) == before and loader.batch_behind(before) == s
        before += sum(len(loader_of(rank).rows(s)) for rank in (0, 1))


def test_averaged_weights_of_a_resumed_run_have_the_frequencies_of_its_words(pairs, tmp_path):
    run = made_run(pairs, tmp_path / "a", "mlm", steps=1, ema=0.9)
    run = replace(run, objectives={"superclip": SuperCLIPConfig()})
    train(run)
    state = start(replace(run, steps=2), resume=True)
    weight = state.pretraining.objectives["superclip"].weight
    assert weight.unique().numel() > 1
    assert torch.equal(state.evaluated.objectives["superclip"].weight, weight)


def test_the_lowest_loss_begins_anew_where_validation_measures_something_else(pairs, tmp_path, capsys):
    run = made_run(pairs, tmp_path / "a", "mlm", steps=1)
    best = train(run).best
    assert start(replace(run, steps=2), resume=True).best == best
    state = start(replace(run, steps=2, validation_rows=2), resume=True)
    assert (state.best, state.stale, state.validated) == (math.inf, 0, 0)
    train(replace(run, steps=2, validation_rows=2), resume=True)
    assert "begins anew" in capsys.readouterr().out


def test_what_the_config_has_no_longer_may_be_named(pairs, tmp_path):
    run = made_run(pairs, tmp_path / "a", "mlm", steps=1)
    run = replace(run, optim=replace(run.optim, parts={"image": 2.0, "text": 2.0}))
    train(run)
    without = replace(run, optim=replace(run.optim, parts={"text": 2.0, "image": 3.0, "fusion": 3.0}))
    with pytest.raises(UserError, match=r"optim\.parts\.fusion optim\.parts\.image"):
        start(without, resume=True)
    plain = replace(run, optim=replace(run.optim, parts={}))
    for change in (["optim.parts"], ["optim.parts.image", "optim.parts.text"]):
        assert {*start(plain, resume=True, change=change).changed} == {"optim.parts.image", "optim.parts.text"}


def test_moments_are_those_of_the_same_parameters(pairs, tmp_path):
    run = made_run(pairs, tmp_path / "a", "mlm", steps=1)
    train(run)
    # As many groups as before, of other parameters.
    other = replace(run, optim=replace(run.optim, spared="flip"))
    with pytest.raises(UserError, match=r"`optim\.spared`"):
        start(other, resume=True, change=["optim.spared"])
    saved = load_checkpoint(tmp_path / "a/last.pt")
    del saved["groups"]
    save_checkpoint(tmp_path / "a/last.pt", saved)
    assert start(run, resume=True).step == 1


def test_a_checkpoint_may_be_older_than_a_field(pairs, tmp_path):
    run = made_run(pairs, tmp_path / "a", "mlm", steps=1)
    train(run)
    saved = load_checkpoint(tmp_path / "a/last.pt")
    for part, name in (
        (saved["run"], "reduced"),
        (saved["run"]["augment"], "operations"),
        (saved["run"]["data"], "order"),
    ):
        del part[name]
    save_checkpoint(tmp_path / "a/last.pt", saved)
    assert start(run, resume=True).changed == {}
    augmented = replace(run, augment=replace(run.augment, operations=2))
    with pytest.raises(UserError, match=r"augment\.operations: 0 then, 2 now"):
        start(augmented, resume=True)
