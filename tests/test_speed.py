"""Recipes are timed in turns, with their FLOPs, memory and loader, and other libraries beside them."""

from __future__ import annotations

import json
import math
import time
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fastvlp.batch import Batch
from fastvlp.cli import main
from fastvlp.data.tokenize import Tokenizer
from fastvlp.errors import UserError
from fastvlp.model.sizes import flip_tiny
from fastvlp.recipes import recipe
from fastvlp.speed.clock import Quartiles, in_turn, ratio
from fastvlp.speed.made_data import padded, with_made_data
from fastvlp.speed.measure import measure_speed, prepared, varied
from fastvlp.speed.memory import CountedBytes, held_bytes, largest_rows
from fastvlp.speed.peers import PEERS
from fastvlp.speed.trial import Trial, repeated
from fastvlp.tasks.vqa import VQAData
from fastvlp.training.flops import FlopCounter, Shape
from fastvlp.training.reduced_start import ReducedStart
from tests.training.runs import made_pairs, made_run


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return made_pairs(tmp_path_factory.mktemp("pairs"))


def test_arms_take_turns_in_alternating_order():
    order = []
    results = in_turn(["a", "b"], 3, lambda name: order.append(name) or len(order))
    assert order == ["a", "b", "b", "a", "a", "b"] and results == {"a": [1, 4, 5], "b": [2, 3, 6]}


def test_ratios_are_those_of_neighbours():
    assert ratio([2.0, 40.0, 6.0], [1.0, 10.0, 2.0]) == Quartiles(2.5, 3.0, 3.5)
    assert Quartiles.of([5.0]) == Quartiles(5.0, 5.0, 5.0)


@pytest.mark.parametrize(("limit", "largest"), [(1000, 1000 // 8 * 8), (7, 0), (8, 8), (12, 8)])
def test_the_search_ends_at_the_largest_batch_that_fits(limit, largest):
    sizes = []

    def memory_of(B: int) -> float:
        sizes.append(B)
        return 1e6 + 500 * B if B < 2000 else float("inf")

    result = largest_rows(memory_of, 1e6 + 500 * limit, 8)
    assert largest * 31 / 32 <= result <= largest and all(B % 8 == 0 for B in sizes) and len(sizes) < 8


@pytest.mark.parametrize("fake", [False, True])
def test_counted_bytes_are_those_of_living_storages(fake):
    with FakeTensorMode(allow_non_fake_inputs=True) if fake else torch.enable_grad():
        x, index = torch.ones(1000, requires_grad=True), torch.zeros(1000)
        with CountedBytes() as memory:
            y = x.exp()
            index.add_(1)  # not made inside
            part = y[:10]
            total = part.sum()
            assert memory.now == memory.peak == 4000 + 4
            total.backward()
            del y, part, total
            assert (
                memory.now == 4000 and 8004 <= memory.peak <= 16004
            )  # the gradient; and the peak while it is computed
        assert x.grad is not None


def test_the_largest_batch_before_memory_runs_out_is_found():
    asked = []

    def bytes_of(rows: int) -> float:
        asked.append(rows)
        return math.inf if rows > 1000 else 50 + 3 * rows

    assert 968 <= largest_rows(bytes_of, math.inf, 8) <= 1000 and len(asked) <= 12


def test_what_is_held_between_steps_is_counted():
    linear = nn.Linear(3, 2)
    optimiser = torch.optim.AdamW(linear.parameters())
    assert held_bytes(optimiser, linear) == 8 * 4
    linear(torch.ones(1, 3)).sum().backward()
    optimiser.step()
    # Two moments, and a number of steps for each of weight and bias.
    assert held_bytes(optimiser, linear) == 8 * 4 * 3 + 2 * 4
    assert held_bytes(optimiser, linear, deepcopy(linear)) == 8 * 4 * 4 + 2 * 4


def test_a_counter_for_every_step_counts_each_new_shape_exactly():
    counter, matrix = FlopCounter(every=0), nn.Linear(4, 4, bias=False)
    for rows in (2, 3, 2, 3):
        counter.begin_step()
        with counter.counting(Shape("step", rows)):
            matrix(torch.zeros(rows, 4))
        assert counter.step == 2 * rows * 16


def test_a_repeated_batch_has_other_pairs():
    batch = Batch(
        image=torch.arange(2 * 3, dtype=torch.uint8).view(2, 3, 1, 1),
        ids=torch.tensor([[1, 5, 2], [1, 6, 2]]),
        length=torch.tensor([3, 3]),
        seed=torch.tensor([7, 8]),
        content=torch.tensor([[1, 2], [3, 4]]),
    )
    larger = repeated(batch, 5)
    assert larger.ids[:, 1].tolist() == [5, 6, 5, 6, 5] and len(larger) == 5
    assert len({*larger.seed.tolist()}) == 5 and len({*larger.content.flatten().tolist()}) == 10


def test_a_vocabulary_is_as_large_as_asked_for():
    words = Tokenizer.train(["a red square", "a red circle"], vocab_size=60)
    larger = padded(words, 200)
    assert words.vocab_size < 200 == larger.vocab_size
    assert larger.encode(["a red"], 9)[0].tolist() == words.encode(["a red"], 9)[0].tolist()


@pytest.mark.slow
def test_recipes_are_measured_in_turns(pairs, tmp_path):
    out, trace = tmp_path / "speed.jsonl", tmp_path / "trace.json"
    run = made_run(pairs, tmp_path, "mlm")
    speeds = measure_speed(
        [run],
        vary=("data.batch_size=4,8",),
        repetitions=2,
        largest_batch=True,
        memory_gb=0.004,
        trace=trace,
        out=out,
    )
    small, large = speeds.arms
    assert (small.name, large.name) == ("made data.batch_size=4", "made data.batch_size=8") and speeds.clock == "cpu"
    assert (small.rows, large.rows) == (4, 8) and 1.5 < large.flops_times < 2.5 and small.flops_times == 1
    assert small.times == Quartiles(1, 1, 1) and large.step_s.low <= large.step_s.median <= large.step_s.high
    assert large.tokens_per_s > 0 and large.pairs_per_s == pytest.approx(8 / large.step_s.median)
    assert 0 < small.memory_bytes < large.memory_bytes and small.mfu is None and small.compile_s is None
    assert small.loader_s > 0 and 0 <= small.data_wait <= 1 and len(small.losses) == 2
    assert 16 <= small.largest_batch <= 64 and 16 <= large.largest_batch <= 64
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["name"] for row in rows] == [small.name, large.name]
    assert rows[1]["commit"] is not None and rows[1]["device"] and rows[1]["step_s"]["median"] == large.step_s.median
    assert rows[1]["config"]["batch_size"] == 8 and rows[1]["memory_limit"] == 4e6
    traces = sorted(path.name for path in tmp_path.glob("trace*"))
    assert traces == ["trace-made-data.batch_size-4.json", "trace-made-data.batch_size-8.json"]
    assert json.loads((tmp_path / traces[0]).read_text())["traceEvents"]


def test_several_fields_vary_one_at_a_time(tmp_path):
    run = made_run(tmp_path, tmp_path, "mlm")
    arms = varied({"a": run, "b": run}, None, ["keep=1,0.5", "recompute=true"])
    assert [*arms] == [f"{name} {change}" for name in "ab" for change in ("keep=1", "keep=0.5", "recompute=true")]
    assert [(arm.keep, arm.recompute) for arm in arms.values()] == 2 * [(1.0, False), (0.5, False), (1.0, True)]


def ready_run(pairs, folder, *objectives, **changes):
    """A run as `measure_speed` prepares it."""
    run = replace(made_run(pairs, folder, *objectives), **changes)
    return prepared({"made": run}, folder, made_data=False, batches=1, repetitions=1)["made"]


def test_a_reduced_beginning_is_not_what_is_measured(pairs, tmp_path):
    reduced = ReducedStart(share=0.9, size=8, max_length=4)
    whole, cheap = (Trial(ready_run(pairs, tmp_path, "clip", reduced=r), 1) for r in (ReducedStart(), reduced))
    assert cheap.step().flops == whole.step().flops
    with pytest.raises(UserError, match="whole steps"):
        varied({"made": whole.run}, None, ["reduced.share=0.5,0.9"])


def test_the_start_of_the_loader_is_no_waiting_of_a_step(pairs, tmp_path):
    trial, closed = Trial(ready_run(pairs, tmp_path, "clip"), 1), []

    class SlowStart:
        def batches(self, start=0):
            time.sleep(5)
            try:
                while True:
                    yield trial.loading.made[0], []
            finally:
                closed.append(True)

    trial.loader = SlowStart()
    assert trial.data_wait(2) < 0.5 and closed == [True]
    assert trial.step().rows == 8


def test_waiting_for_data_is_measured_on_few_long_steps(pairs, tmp_path, monkeypatch):
    trial, taken = Trial(ready_run(pairs, tmp_path, "clip"), 1), []
    monkeypatch.setattr("fastvlp.speed.trial.WAITING_S", 0.0)
    made = trial.loader.make
    trial.loader.make = lambda rows: taken.append(1) or made(rows)
    trial.data_wait(50)
    assert len(taken) < 10


def test_each_objective_of_a_mix_is_counted_before_steps_are_timed(pairs, tmp_path):
    # The second objective is drawn in one of ten thousand steps.
    trial = Trial(ready_run(pairs, tmp_path, "flm", "clip", mix={"flm": 1.0, "clip": 1e-4}), 2)
    known = {shape.part.split("/")[0] for shape in trial.state.flops._known}
    assert known == {"flm", "clip"} and trial.state.run.mix == {"flm": 1.0, "clip": 1e-4}
    drawn = trial.step()
    assert drawn.tokens > 0 and drawn.flops > 0
    alone = Trial(ready_run(pairs, tmp_path, "flm"), 2)
    assert trial.bytes() >= alone.bytes()


def test_averaged_weights_are_part_of_the_memory(pairs, tmp_path):
    plain, averaged = (Trial(ready_run(pairs, tmp_path, "clip", ema=ema), 1) for ema in (None, 0.9))
    weights = sum(p.nbytes for p in plain.state.pretraining.parameters())
    assert averaged.bytes() - plain.bytes() >= weights


def test_the_batches_of_a_step_are_part_of_its_memory(pairs, tmp_path):
    trial = Trial(ready_run(pairs, tmp_path, "clip", accumulate=3), 1)
    micro = trial.loading.made[0]
    assert trial.batch_bytes > 3 * micro.image.nbytes
    before = trial.bytes()
    trial._use([repeated(micro, 16)])
    assert trial.batch_bytes > 6 * micro.image.nbytes and trial.bytes() > before


def test_the_seconds_of_compiling_are_those_that_pytorch_counts(pairs, tmp_path, monkeypatch):
    counted = iter([(3, 1.5), (7, 6.0)])
    monkeypatch.setattr("fastvlp.speed.trial.compiled", lambda: next(counted))
    monkeypatch.setattr("fastvlp.training.start.compile_blocks", lambda *_: None)
    assert Trial(ready_run(pairs, tmp_path, "clip", compile=True), 1).compile_s == 4.5


def test_another_library_without_memory_is_named(pairs, tmp_path, monkeypatch):
    def full(trial):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setitem(PEERS, "transformers", full)
    with pytest.raises(UserError, match="transformers, as made: a step does not fit"):
        measure_speed([made_run(pairs, tmp_path, "clip")], repetitions=1, batches=1, beside=("transformers",))


def test_made_data_take_the_place_of_all_data(tmp_path):
    run = recipe("flip_demo")
    run = replace(run, data=replace(run.data, train="own", mix={"other": 0.5}, val="v"), vocab=300)
    made = with_made_data({"a": run, "b": run}, tmp_path, 1)
    assert made["a"].data.mix is None and made["a"].data.val is None and made["a"].tokenizer == made["b"].tokenizer
    with pytest.raises(UserError, match="VQAData"):
        with_made_data({"a": replace(run, data=VQAData(batch_size=2, train="own", answers=()))}, tmp_path, 1)


def test_equal_recipes_have_equal_losses_and_one_floor(pairs, tmp_path, monkeypatch):
    run = made_run(pairs, tmp_path, "flm")
    monkeypatch.setattr("fastvlp.speed.measure.peak_flops", lambda device, precision: 1e9)
    first, second = measure_speed([run, replace(run, name="again")], repetitions=2).arms
    assert first.floor_s == second.floor_s == first.flops / 1e9
    assert second.mfu == pytest.approx(second.floor_s / second.step_s.median)
    assert first.losses == second.losses and second.loss_difference == 0


def test_the_same_towers_of_transformers_take_turns_on_made_data(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "towers.py"
    path.write_text(
        "from dataclasses import replace\nfrom fastvlp.recipes import recipe\n"
        "from fastvlp.model.sizes import clip_small\n\n\ndef towers():\n"
        "    run = recipe('clip_photos')\n"
        "    model = clip_small(size=32)\n"
        "    model = replace(model, image=replace(model.image, depth=1), text=replace(model.text, depth=1))\n"
        "    return replace(run, name='towers', model=model, device='cpu', precision='fp32')\n"
    )
    words = ["--made-data", "--set", "data.batch_size=4", "vocab=300", "--repetitions", "1", "--beside", "transformers"]
    assert main(["bench", str(path), *words, "--out", "speed.jsonl"]) == 0
    ours, theirs = (json.loads(line) for line in (tmp_path / "speed.jsonl").read_text().splitlines())
    assert ours["config"]["vocabulary"] == 300 and theirs["name"] == "transformers, as towers"
    assert theirs["flops_times"] == pytest.approx(1, abs=0.02) and theirs["config"] is None
    shown = capsys.readouterr().out
    assert "ms a step" in shown and "transformers" in shown


def test_what_cannot_be_measured_is_refused(pairs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = made_run(pairs, tmp_path, "flm")
    for options, words in (
        ({"beside": ("transformers",)}, "two encoders"),
        ({"largest_batch": True}, "memory_gb"),
        ({"memory_gb": 1.0}, "largest_batch"),
        ({"repetitions": 0}, "repetitions"),
        ({"vary": ("keep",)}, "FIELD=VALUE"),
        ({"vary": ("kep=1",)}, "keep"),
    ):
        with pytest.raises(UserError, match=words):
            measure_speed([run], **{"repetitions": 1} | options)
    with pytest.raises(UserError, match="made_data"):
        measure_speed(["flm_demo"])
    towers = replace(recipe("flip_demo"), model=flip_tiny(), accumulate=2)
    with pytest.raises(UserError, match="accumulate"):
        measure_speed([towers], set=["data.batch_size=2", "vocab=200"], made_data=True, beside=("transformers",))
