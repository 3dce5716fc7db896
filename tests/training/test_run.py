"""Guarantees of the loop: sums do not depend on how a step is divided, and resuming changes nothing."""

from __future__ import annotations

import errno
import itertools
import json
import math
import os
import re
import shutil
import signal
from dataclasses import replace

import pytest
import torch

from fastvlp.data.pairs import PairMaker
from fastvlp.data.records.shards import ShardWriter
from fastvlp.errors import UserError
from fastvlp.model.saving import load_model
from fastvlp.objectives.itm import ITMConfig
from fastvlp.training import loop
from fastvlp.training.checkpoint import load_checkpoint, save
from fastvlp.training.loop import start, steps, train, validate
from tests.training.runs import ROUNDING, assert_equal, made_pairs, made_records, made_run, weights


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return made_pairs(tmp_path_factory.mktemp("pairs"))


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_a_run_says_that_it_ended_and_that_it_had(pairs, tmp_path, capsys):
    run = made_run(pairs, tmp_path / "a")
    train(run)
    assert "finished after step" in capsys.readouterr().out
    train(run, resume=True)
    assert "was at its end already" in capsys.readouterr().out


@pytest.mark.parametrize("workers", [0, 1])
def test_a_resumed_run_equals_the_straight_one_bit_for_bit(pairs, tmp_path, workers):
    # 20 rows do not divide by 4 x 2: epochs end inside steps; dropout, masks, spans and averaged weights are in play.
    pairs = made_pairs(tmp_path / "pairs", 20)
    options = {"batch_size": 4, "accumulate": 2, "ema": 0.9, "dropout": 0.1}
    straight = train(made_run(pairs, tmp_path / "a", **options))
    run = made_run(pairs, tmp_path / "b", **options)
    state = start(run)
    for report in steps(state):
        if report.step == 3:
            break
    save(state)
    state.tokenizer.save(run.folder / "tokenizer.json")
    resumed = train(replace(run, data=replace(run.data, workers=workers)), resume=True)
    assert resumed.step == straight.step == 6
    assert (resumed.pairs, resumed.tokens) == (straight.pairs, straight.tokens)
    assert_equal(weights(resumed), weights(straight))
    assert_equal(resumed.ema.state_dict(), straight.ema.state_dict())
    left, right = (load_checkpoint(tmp_path / name / "last.pt") for name in "ab")
    moments = [saved["optimiser"]["state"] for saved in (left, right)]
    for index, state in moments[0].items():
        assert_equal(state, moments[1][index])


def test_accumulation_equals_a_big_batch(pairs, tmp_path):
    whole = train(made_run(pairs, tmp_path / "a", batch_size=12))
    parts = train(made_run(pairs, tmp_path / "b", batch_size=3, accumulate=4))
    assert whole.tokens == parts.tokens
    assert_equal(weights(whole), weights(parts), ROUNDING)


def test_padding_changes_nothing(pairs, tmp_path):
    run = made_run(pairs, tmp_path / "a")
    narrow, wide = start(run), start(run)
    make = wide.train.make

    def padded(rows):
        batch, dropped = make(rows)
        pad = torch.full((len(batch), 3), wide.tokenizer.pad)
        return replace(batch, ids=torch.cat([batch.ids, pad], 1)), dropped

    wide.train.make = padded
    for left, right in zip(steps(narrow), steps(wide)):
        assert left.losses == pytest.approx(right.losses, abs=1e-5)
    assert_equal(weights(narrow), weights(wide), 1e-5)


def test_the_reported_loss_is_the_weighted_sum_of_the_means(pairs, tmp_path):
    state = start(made_run(pairs, tmp_path / "a", "flm"))
    report = next(steps(state))
    terms = [report.losses[f"flm/{name}"] for name in ("reconstruct", "forward", "reverse")]
    assert report.losses["loss"] == pytest.approx(sum(terms) / 3, rel=1e-5)
    assert report.tokens == state.tokens > report.pairs == 8


def test_a_run_leaves_its_config_log_and_weights(pairs, tmp_path, capsys):
    state = train(made_run(pairs, tmp_path / "a", "mlm", validate_every=2, ema=0.5), verbose=True)
    config = json.loads((tmp_path / "a/config.json").read_text())
    # The recipe leaves the vocabulary open; the tokenizer fills it in.
    text, tokenizer = config["model"]["text"], state.tokenizer
    assert (text["vocab"], text["pad"], text["mask"]) == (tokenizer.vocab_size, tokenizer.pad, tokenizer.mask)
    assert f"vocab: {tokenizer.vocab_size}\n" in capsys.readouterr().out
    assert config["objectives"]["mlm"]["type"] == "MLMConfig" and config["data"]["batch_size"] == 8
    lines = [json.loads(line) for line in (tmp_path / "a/log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "train"] == [1, 2, 3, 4, 5, 6]
    losses = [line["loss"] for line in lines if line["kind"] == "validation"]
    assert len(losses) == 3 and state.best == min(losses)
    saved = load_model(tmp_path / "a", "last")
    assert saved.info["reading"] == "full" and saved.info["step"] == 6
    assert_equal(saved.model.state_dict(), state.ema.module.model.state_dict())


def test_validation_draws_the_same_every_time_and_leaves_training_mode(pairs, tmp_path):
    state = start(made_run(pairs, tmp_path / "a", dropout=0.1))
    assert validate(state) == validate(state)
    assert state.pretraining.training


def test_a_last_batch_of_one_row_can_be_validated(tmp_path):
    pairs = made_pairs(tmp_path / "pairs", 8)
    run = made_run(pairs, tmp_path / "a", "mlm", steps=1, batch_size=5)
    state = train(replace(run, objectives={"itm": ITMConfig(), **run.objectives}))
    assert 0 < state.best < math.inf


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="compiling for the CPU needs g++")
def test_compiled_blocks_compute_the_same(pairs, tmp_path):
    plain, compiled = (start(made_run(pairs, tmp_path / "a", "clip", compile=flag, steps=2)) for flag in (False, True))
    for left, right in zip(steps(plain), steps(compiled)):
        assert left.losses == pytest.approx(right.losses, abs=1e-4)
    assert_equal(weights(plain), weights(compiled), 1e-4)


def test_a_budget_of_time_ends_on_time_with_a_rate_near_zero(pairs, tmp_path):
    # Each look at the clock is 1/32 of a second after the one before, and a step looks at it at its start and its end.
    looks = itertools.count()
    run = replace(made_run(pairs, tmp_path / "a", "mlm"), steps=None, budget_s=1.0)
    state = start(run)
    state.clock = lambda: next(looks) / 32
    reports = list(steps(state))
    assert all(report.seconds == 1 / 32 for report in reports)
    assert state.elapsed == 1.0 and len(reports) == 32
    assert reports[-1].lr < 0.1 * max(report.lr for report in reports)


def test_a_step_that_is_not_finite_is_skipped_and_counted(pairs, tmp_path):
    state = start(made_run(pairs, tmp_path / "a", "mlm"))
    reports = steps(state)
    next(reports)
    bias = state.model.head.vocabulary.bias
    kept = bias.detach().clone()
    bias.data[7] = math.inf
    before = weights(state)
    assert next(reports).skipped and state.skipped == state.bad_steps == 1
    assert_equal(weights(state), before)
    bias.data.copy_(kept)
    assert not next(reports).skipped and (state.skipped, state.bad_steps) == (1, 0)


def test_too_many_bad_steps_stop_the_run_with_the_cause(pairs, tmp_path):
    state = start(made_run(pairs, tmp_path / "a", "mlm", max_bad_steps=2))
    state.model.head.vocabulary.bias.data[7] = math.nan
    with pytest.raises(UserError, match=r"2 steps in a row .*mlm/masked.*head\.vocabulary\.bias"):
        list(steps(state))
    state = start(made_run(pairs, tmp_path / "a", "mlm", max_bad_steps=2))
    state.pretraining.model.head.vocabulary.weight.register_hook(lambda grad: grad * math.nan)
    with pytest.raises(UserError, match=r"gradient is not.*`optim\.lr`"):
        list(steps(state))


def test_sigterm_saves_and_says_how_to_go_on(pairs, tmp_path, capsys):
    run = made_run(pairs, tmp_path / "a", "mlm")
    make, calls = PairMaker.__call__, []

    def counted(self, rows):
        calls.append(1)
        if len(calls) == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return make(self, rows)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PairMaker, "__call__", counted)
        with pytest.raises(SystemExit) as stopped:
            train(run)
    assert stopped.value.code == 143 and "--resume" in capsys.readouterr().out
    assert 0 < load_checkpoint(tmp_path / "a/last.pt")["step"] < 6
    assert_equal(weights(train(run, resume=True)), weights(train(replace(run, out=str(tmp_path / "b")))))


def test_a_checkpoint_is_saved_after_so_many_seconds(pairs, tmp_path, monkeypatch):
    run = made_run(pairs, tmp_path / "a", "mlm", steps=6, validate_every=None, checkpoint_every=None, checkpoint_s=2.5)
    monkeypatch.setattr(loop, "agree", lambda *_: 1.0)  # each step takes a second
    saved = []
    monkeypatch.setattr(loop, "save", lambda state, **how: saved.append(state.step) or save(state, **how))
    train(run)
    assert saved[:2] == [3, 6]


def test_a_full_disk_leaves_the_earlier_checkpoint(pairs, tmp_path, monkeypatch):
    run = made_run(pairs, tmp_path / "a", "mlm", checkpoint_every=2)
    written, calls = torch.save, []

    def full(state, file):
        calls.append(1)
        if len(calls) in (2, 3):  # at step 4, and when the failed run tries once more
            file.write(b"half of it")
            raise OSError(errno.ENOSPC, "No space left on device")
        written(state, file)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match=r"last\.pt.*No space left"):
        train(run)
    assert load_checkpoint(tmp_path / "a/last.pt")["step"] == 2
    assert_equal(weights(train(run, resume=True)), weights(train(replace(run, out=str(tmp_path / "b")))))


def test_a_folder_that_holds_a_run_is_not_overwritten(pairs, tmp_path):
    run = made_run(pairs, tmp_path / "a", "mlm", steps=1)
    train(run)
    with pytest.raises(UserError, match="`resume`"):
        train(run)


def test_resuming_nothing_says_that_it_starts_anew(pairs, tmp_path, capsys):
    run = made_run(pairs, tmp_path / "a", "mlm", steps=1)
    train(run, resume=True)
    assert f"{tmp_path / 'a'}: no checkpoint here" in capsys.readouterr().out
    train(replace(run, steps=2), resume=True)
    assert "no checkpoint" not in capsys.readouterr().out


def test_another_length_of_a_resumed_run_is_printed(pairs, tmp_path, capsys):
    run = made_run(pairs, tmp_path / "a", "mlm", steps=1)
    train(run)
    train(run, resume=True)
    assert "length was" not in capsys.readouterr().out
    train(replace(run, steps=None, budget_s=1e-6), resume=True)
    assert f"{tmp_path / 'a'}: length was 1 steps, now 1e-06 s" in capsys.readouterr().out


@pytest.mark.parametrize(("objective", "rows", "warned"), [("clip", 16, True), ("clip", 12, False), ("mlm", 16, False)])
def test_a_step_that_contrasts_records_with_themselves_warns(tmp_path, objective, rows, warned, capsys):
    pairs = made_pairs(tmp_path / "pairs", 12)
    run = made_run(pairs, tmp_path / "a", objective, steps=1, batch_size=rows // 2, accumulate=2)
    state = train(run)
    # The rows of the first step, whose micro-batches are scored together.
    assert (len({row.index for s in (0, 1) for row in state.train.rows(s)}) < rows) == (rows == 16)
    printed = re.search(r"`data.batch_size` 8: .* 16 rows .* 12 records", capsys.readouterr().out)
    assert (printed is not None) == warned


def test_resuming_another_run_names_the_fields(pairs, tmp_path):
    run = made_run(pairs, tmp_path / "a", "mlm", steps=1)
    train(run)
    other = replace(run, optim=replace(run.optim, lr=0.5), model=replace(run.model, reconstructor=None))
    with pytest.raises(UserError, match=r"model\.reconstructor.*optim\.lr: 0\.01 then, 0\.5 now"):
        train(other, resume=True)
    assert train(replace(run, steps=2), resume=True).step == 2


def test_unreadable_records_are_dropped_and_named(tmp_path):
    pairs = made_pairs(tmp_path / "pairs")
    with ShardWriter(tmp_path / "bad") as writer:
        for record in made_records(8):
            writer.write(replace(record, images=(record.images[0][:60],)) if record.key == "r003" else record)
    run = made_run(pairs, tmp_path / "a", "mlm", steps=2)
    state = train(replace(run, data=replace(run.data, train=str(tmp_path / "bad"))))
    assert list(state.dropped) == ["r003"] and state.pairs == 14
    assert '"record": "r003"' in (tmp_path / "a/log.jsonl").read_text()
    with pytest.raises(UserError, match="r003"):
        validate(start(replace(run, out=str(tmp_path / "b"), data=replace(run.data, val=str(tmp_path / "bad")))))


def test_inherited_weights_are_logged_once(pairs, tmp_path, capsys):
    source = made_run(pairs, tmp_path / "a", "mlm", steps=1)
    train(replace(source, model=replace(source.model, reconstructor=None)))
    run = replace(made_run(pairs, tmp_path / "b", "flm", steps=1), init=str(tmp_path / "a"))
    run = replace(run, objectives={"itm": ITMConfig(), **run.objectives})
    state = train(run)
    train(replace(run, steps=2), resume=True)
    lines = [json.loads(line) for line in (tmp_path / "b/log.jsonl").read_text().splitlines()]
    (inherited,) = [line for line in lines if line["kind"] == "inherited"]
    every = {name.removeprefix("model.") for name, _ in state.pretraining.named_parameters()}
    assert set(inherited["loaded"] + inherited["fresh"]) == every
    assert any(name.startswith("objectives.itm.") for name in inherited["fresh"]) and not inherited["resized"]
    summary = state.inherited.summary()
    assert f"{tmp_path / 'a'}: {summary}" in capsys.readouterr().out
    assert sum(map(int, re.findall(r"\d+", summary.partition(";")[0]))) == len(inherited["loaded"])


def test_a_cut_shard_is_logged_once_at_the_start(tmp_path):
    pairs = made_pairs(tmp_path / "pairs")
    tar = pairs / "train" / "00000.tar"
    tar.write_bytes(tar.read_bytes()[: tar.stat().st_size * 2 // 3])
    run = made_run(pairs, tmp_path / "a", "mlm", steps=1)
    state = train(run)
    assert 0 < state.train.count < 24 and "cut or damaged" in state.dropped[str(tar)]
    known = state.dropped
    assert train(replace(run, steps=2), resume=True).dropped == known
    lines = [json.loads(line) for line in (tmp_path / "a/log.jsonl").read_text().splitlines()]
    dropped = [(line["step"], line["record"]) for line in lines if line["kind"] == "dropped"]
    assert dropped.count((0, str(tar))) == 1 and len(dropped) == len(known)
    assert {line["dropped"] for line in lines if line["kind"] == "train"} == {len(known)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": None}, "neither of `steps` and `budget_s`"),
        ({"budget_s": 3.0}, "both of `steps` and `budget_s`"),
        ({"accumulate": 0}, "accumulate"),
        ({"steps": 0}, "`steps` must be at least 1"),
        ({"steps": None, "budget_s": 0.0}, "budget_s"),
        ({"validate_every": 0}, "`validate_every` must be at least 1"),
        ({"ema": 1.0}, "ema"),
        ({"keep": 0.0}, "keep"),
        ({"objectives": {}}, "objectives"),
        ({"device": "nonsense"}, "device"),
    ],
)
def test_what_cannot_be_run_is_said_first(pairs, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        start(replace(made_run(pairs, tmp_path / "a", "mlm"), **changes))


def test_a_run_ends_when_the_validation_loss_no_longer_falls(pairs, tmp_path, capsys):
    # A rate of nearly 0 leaves the loss as it is after the first validation.
    run = made_run(pairs, tmp_path / "a", "mlm", validate_every=1, patience=2)
    run = replace(run, optim=replace(run.optim, lr=1e-30))
    state = train(run)
    assert (state.step, state.stale) == (3, 2)
    assert "not fallen for 2 validations" in capsys.readouterr().out
    lines = [json.loads(line) for line in (tmp_path / "a/log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "validation"] == [1, 2, 3]
    assert train(run, resume=True).step == 3
    assert "raise `patience`" in capsys.readouterr().out
    assert train(replace(run, patience=3), resume=True).step == 4
    assert train(replace(run, patience=None), resume=True).step == 6


def test_patience_is_that_of_the_whole_run(pairs, tmp_path):
    run = made_run(pairs, tmp_path / "a", "mlm", validate_every=1, steps=2, patience=2)
    run = replace(run, optim=replace(run.optim, lr=1e-30))
    assert train(run).stale == 1
    assert train(replace(run, steps=6), resume=True).step == 3


def test_a_checkpoint_without_a_count_of_validations_is_resumed(pairs, tmp_path):
    run = made_run(pairs, tmp_path / "a", "mlm", steps=1)
    train(run)
    saved = load_checkpoint(tmp_path / "a/last.pt")
    del saved["stale"]
    torch.save(saved, tmp_path / "a/last.pt")
    assert train(replace(run, steps=2), resume=True).step == 2


def test_patience_without_validations_is_refused(pairs, tmp_path):
    run = made_run(pairs, tmp_path / "a", "mlm", patience=2)
    with pytest.raises(UserError, match="`validate_every`"):
        start(run)
    with pytest.raises(UserError, match=r"`data\.val`"):
        start(replace(run, validate_every=1, data=replace(run.data, val=None)))
