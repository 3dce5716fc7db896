"""Layers that are compiled, or computed again in the backward pass, compute the same."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from fastvlp.batch import Batch
from fastvlp.errors import UserError
from fastvlp.model.encoders.transformers_image import TransformersImageConfig
from fastvlp.objectives.objective import combine
from fastvlp.speed.memory import CountedBytes
from fastvlp.training.blocks import compile_blocks
from fastvlp.training.flops import Flops
from fastvlp.training.loop import start, steps, train
from fastvlp.training.pretraining import Pretraining
from tests.towers.public import DINO
from tests.training.runs import assert_equal, made_pairs, made_run, weights


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return made_pairs(tmp_path_factory.mktemp("pairs"), 60)


# Breaks and recompilations are those of the tracing, which a backend follows; test_run.py trains with the real one.
TRACING = "eager"


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    counters.clear()
    before = torch._dynamo.config.error_on_recompile
    yield torch._dynamo.config
    torch._dynamo.config.error_on_recompile = before
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("objectives", [("flm",), ("mlm", "prefixlm", "clip")], ids=["flm", "others"])
def test_lengths_neither_break_the_graph_nor_compile_again(objectives, pairs, tmp_path, fresh_dynamo):
    plain, compiled = (
        start(made_run(pairs, tmp_path / "a", *objectives, steps=6, batch_size=2, vocab=200)) for _ in range(2)
    )
    compile_blocks(compiled.pretraining, compiled.device, backend=TRACING)
    lengths, graphs = set(), []
    for left, right in zip(steps(plain), steps(compiled)):
        assert left.losses == pytest.approx(right.losses, abs=1e-4)
        lengths.add(plain.train.make(plain.train.rows(left.step - 1))[0].ids.shape[1])
        graphs.append(counters["stats"]["unique_graphs"])
        # The first step counts FLOPs, uncompiled; the second meets every kind of layer.
        fresh_dynamo.error_on_recompile = left.step >= 2
    assert len(lengths) >= 3 and graphs[0] == 0 < graphs[1] == graphs[-1] and not counters["graph_break"]
    assert_equal(weights(plain), weights(compiled), 1e-4)


def test_the_log_says_what_was_compiled(pairs, tmp_path, fresh_dynamo, monkeypatch, capsys):
    monkeypatch.setattr(
        "fastvlp.training.start.compile_blocks",
        lambda module, device: compile_blocks(module, device, backend=TRACING),
    )
    train(made_run(pairs, tmp_path / "a", "mlm", steps=4, compile=True))
    lines = [json.loads(line) for line in (tmp_path / "a/log.jsonl").read_text().splitlines()]
    (line,) = [line for line in lines if line["kind"] == "compiled" and line["step"] < 4]
    assert line["step"] == 2 and line["graphs"] >= 2 and line["seconds"] > 0


def test_a_missing_compiler_is_named(pairs, tmp_path, monkeypatch):
    def none() -> str:
        raise RuntimeError("No working C++ compiler found")

    monkeypatch.setattr("torch._inductor.cpp_builder.get_cpp_compiler", none)
    with pytest.raises(UserError, match=r"C\+\+ compiler"):
        start(made_run(pairs, tmp_path / "a", "mlm", compile=True))


def gradients(pretraining: Pretraining, batch: Batch) -> tuple[dict[str, Tensor], int, int]:
    """The gradients of a step, the bytes that it made at once, and its FLOPs."""
    with Flops() as flops, CountedBytes() as counted:
        torch.manual_seed(1)
        combine(pretraining(batch)).backward()
    return {name: p.grad for name, p in pretraining.named_parameters() if p.grad is not None}, counted.peak, flops.total


@pytest.mark.parametrize("objectives", [("flm", "mlm"), ("clip",)])
def test_recomputed_layers_have_the_same_gradients_and_hold_less(objectives, pairs, tmp_path):
    run = made_run(pairs, tmp_path / "a", *objectives, dropout=0.1)
    run = replace(run, model=replace(run.model, image=replace(run.model.image, depth=6)))
    plain, again = (start(replace(run, recompute=flag)) for flag in (False, True))
    assert not plain.recomputes and again.recomputes["image"] == 6
    batch, _ = plain.train.make(plain.train.rows(0))
    before, held, work = gradients(plain.pretraining, batch)
    after, less, same_work = gradients(again.pretraining, batch)
    assert_equal(before, after)
    assert less < 0.85 * held and same_work == work


def test_public_encoders_recompute_where_they_can(pairs, tmp_path):
    mean = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
    dino = {"model_type": "dinov2", **DINO, "num_hidden_layers": 8}
    resnet = {
        "model_type": "resnet",
        "embedding_size": 8,
        "hidden_sizes": [8, 16],
        "depths": [1, 1],
        "layer_type": "basic",
    }
    run = made_run(pairs, tmp_path / "a", "mlm")
    for architecture, layers in ((dino, 1), (resnet, 0)):
        image = TransformersImageConfig(size=32, **mean, architecture=architecture)
        changed = replace(run, model=replace(run.model, image=image))
        plain, again = (start(replace(changed, recompute=flag)) for flag in (False, True))
        assert again.recomputes["image"] == layers
        batch, _ = plain.train.make(plain.train.rows(0))
        (before, held, work), (after, less, same_work) = (
            gradients(state.pretraining.train(), batch) for state in (plain, again)
        )
        assert_equal(before, after, 1e-6)
        assert less <= held and same_work == work and (less < 0.9 * held or not layers)


def test_the_log_says_which_layers_are_recomputed(pairs, tmp_path):
    state = train(made_run(pairs, tmp_path / "a", "mlm", steps=1, recompute=True))
    lines = [json.loads(line) for line in (tmp_path / "a/log.jsonl").read_text().splitlines()]
    (line,) = [line for line in lines if line["kind"] == "recompute"]
    assert line["layers"] == state.recomputes and set(state.recomputes) >= {"image", "text", "fusion"}
