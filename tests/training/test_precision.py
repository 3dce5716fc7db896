"""The number type that a run computes in: what `auto` means, where it is said, and that a resumed run keeps it."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from fastvlp import dist, recipe
from fastvlp.comparison.compare import slow_arms
from fastvlp.dist import has_fast_bf16, pick_precision
from fastvlp.eval.encoding import Encoding, open_run
from fastvlp.model.saved_run import read_saved_run
from fastvlp.training.loop import start, train
from tests.training.runs import made_pairs, made_run

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
PROCESSOR = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")


@pytest.mark.parametrize(
    ("avx512_bf16", "amx", "fast"), [(False, False, False), (True, False, True), (False, True, True)]
)
def test_a_processor_is_fast_with_avx512_bf16_or_amx(monkeypatch, avx512_bf16, amx, fast):
    for name, value in zip(PROCESSOR, (avx512_bf16, amx)):
        monkeypatch.setattr(torch.cpu, name, lambda value=value: value, raising=False)
    assert has_fast_bf16(CPU) is fast


def test_a_processor_that_torch_knows_nothing_of_is_slow(monkeypatch):
    for name in PROCESSOR:
        monkeypatch.delattr(torch.cpu, name, raising=False)
    assert not has_fast_bf16(CPU) and not has_fast_bf16(torch.device("mps"))


@pytest.mark.parametrize("computes", [True, False])
def test_a_gpu_is_fast_where_it_computes_bf16_itself(monkeypatch, computes):
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: computes or including_emulation
    )
    assert has_fast_bf16(GPU) is computes


@pytest.mark.parametrize("fast", [True, False])
def test_auto_is_bf16_where_that_is_fast_and_was_trained(monkeypatch, fast):
    monkeypatch.setattr(dist, "has_fast_bf16", lambda device: fast)
    assert pick_precision("auto", CPU) == ("bf16" if fast else "fp32")
    assert pick_precision("auto", CPU, trained="fp32") == "fp32"
    assert [pick_precision(choice, CPU, trained="fp32") for choice in ("fp32", "bf16")] == ["fp32", "bf16"]


@pytest.mark.parametrize("fast", [True, False])
def test_bf16_where_it_is_slow_is_warned_of(monkeypatch, fast):
    monkeypatch.setattr(dist, "has_fast_bf16", lambda device: fast)
    assert dist.slow_precision("fp32", CPU) is None
    assert (dist.slow_precision("bf16", CPU) is None) is fast
    arms = {"one": recipe("mlm_demo"), "two": replace(recipe("mlm_demo"), precision="bf16")}
    assert (slow_arms(arms) or "").startswith("" if fast else "two: ")
    assert (slow_arms(arms) is None) is fast


@pytest.fixture
def pairs(tmp_path):
    return made_pairs(tmp_path / "pairs")


@pytest.mark.parametrize("fast", [True, False])
def test_a_run_says_what_it_computes_in_and_goes_on_so(pairs, tmp_path, monkeypatch, fast):
    monkeypatch.setattr(dist, "has_fast_bf16", lambda device: fast)
    run = made_run(pairs, tmp_path / "run", "mlm", precision="auto", steps=2, checkpoint_every=1)
    state = train(run)
    expected = "bf16" if fast else "fp32"
    assert state.precision == state.run.precision == expected
    assert read_saved_run(run.folder).precision == expected
    assert json.loads((run.folder / "about.json").read_text())["precision"] == expected
    first, *others = map(json.loads, (run.folder / "log.jsonl").read_text().splitlines())
    assert not any("`precision`" in line.get("text", "") for line in others)
    assert (first["kind"], first["step"], first["precision"]) == ("start", 0, expected)
    # On another processor too.
    monkeypatch.setattr(dist, "has_fast_bf16", lambda device: not fast)
    assert start(replace(run, steps=3), resume=True).precision == expected
    # A model that was trained in fp32 is evaluated in fp32; one trained in bf16 where that is fast.
    assert open_run(run.folder).loaded.precision == "fp32"
    monkeypatch.setattr(dist, "has_fast_bf16", lambda device: fast)
    assert open_run(run.folder).loaded.precision == expected
    assert open_run(run.folder, Encoding(precision="fp32")).loaded.precision == "fp32"
