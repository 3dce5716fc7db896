"""The linear probe: its minimum, how the strength is chosen, and a run from the command line."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F

from fastvlp.cli import main
from fastvlp.data.records.shards import Shards
from fastvlp.eval.probe import STRENGTHS, choose_strength, fit_logistic, held_out, predict, probe


def clusters(count=80, width=6, classes=3, seed=0, noise=1.0):
    generator = torch.Generator().manual_seed(seed)
    label = torch.arange(count) % classes
    centre = torch.randn(classes, width, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    return centre[label] + noise * torch.randn(count, width, generator=generator, dtype=torch.float64), label


def objective(weight, x, label, strength):
    return F.cross_entropy(predict(x, weight), label) + strength / 2 * weight[:, :-1].square().sum()


@pytest.mark.parametrize("strength", [1e-3, 1e-1, 10.0])
def test_the_fit_is_the_minimum(strength):
    x, label = clusters()
    weight = fit_logistic(x, label, 3, strength)
    at = weight.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(objective(at, x, label, strength), at)
    assert gradient.abs().max() < 1e-5
    other = weight + 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert objective(weight, x, label, strength) < objective(other, x, label, strength)


def test_the_fit_depends_on_no_order_and_no_start():
    x, label = clusters()
    shares = lambda weight: predict(x, weight).softmax(1)  # noqa: E731
    weight = fit_logistic(x, label, 3, 0.01)
    assert (weight == fit_logistic(x, label, 3, 0.01)).all()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(2))
    start = torch.randn(weight.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    for other in (fit_logistic(x[order], label[order], 3, 0.01), fit_logistic(x, label, 3, 0.01, start)):
        torch.testing.assert_close(shares(other), shares(weight), atol=1e-4, rtol=0)
    # The bias is free: data that is moved is fitted the same.
    torch.testing.assert_close(fit_logistic(x + 5, label, 3, 0.01)[:, :-1], weight[:, :-1], atol=1e-3, rtol=0)


def test_strengths_of_scikit_learn():
    """Its minimum of C * sum of losses + |W|**2 / 2 is ours at strength 1 / (C N); two classes have a closed condition:
    W = C * sum of (target - share) x."""
    x, label = clusters(classes=2, count=40)
    C = 0.5
    weight = fit_logistic(x, label, 2, 1 / (C * len(x)))
    share = predict(x, weight).softmax(1)
    expected = C * (F.one_hot(label, 2) - share).T @ x
    torch.testing.assert_close(weight[:, :-1], expected, atol=2e-4, rtol=0)


def test_the_strength_is_the_best_on_what_was_held_out():
    train, val = clusters(count=30, width=40, noise=2.0), clusters(count=300, width=40, seed=1, noise=2.0)
    chosen = choose_strength(train, val, 3)
    assert list(chosen.validation) == sorted(STRENGTHS, reverse=True)
    best = max(chosen.validation.values())
    assert chosen.strength == max(s for s, accuracy in chosen.validation.items() if accuracy == best)
    weight = fit_logistic(*train, 3, chosen.strength)
    accuracy = float((predict(val[0], weight).argmax(1) == val[1]).double().mean())
    assert accuracy == pytest.approx(best, abs=0.011), "a fit that starts elsewhere ends near"


def test_a_tenth_is_held_out_of_the_whole_split():
    chosen = held_out(1000)
    assert int(chosen.sum()) == 100 and (held_out(1000) == chosen).all()
    assert 20 < int(chosen[:500].sum()) < 80
    assert int(held_out(3).sum()) == 1


def test_classes_that_only_the_scored_split_has_are_never_right():
    (train, train_label), (test, test_label) = clusters(noise=0.01), clusters(seed=1, noise=0.01)
    scores, _ = probe({"train": train, "test": test}, {"train": train_label, "test": test_label}, 3)
    assert scores["top1"] == 1
    test_label = torch.where(torch.arange(len(test)) < 20, 3, test_label)
    scores, _ = probe({"train": train, "test": test}, {"train": train_label, "test": test_label}, 4)
    assert scores["top1"] == pytest.approx(0.75) and scores["mean_per_class"] == pytest.approx(0.75)


@pytest.mark.slow
@pytest.mark.parametrize("run", ["both", "flm"])
def test_a_run_is_probed_from_the_command_line(run, runs, world, capsys):
    argv = ["evaluate", "probe", str(runs[run]), "--data", str(world), "--prefix", "singles-"]
    assert main(argv) == 0
    printed = capsys.readouterr().out
    assert "classes_only_in_test 8" in printed
    (path,) = (runs[run] / "evaluations").glob("probe-*.json")
    (result,) = json.loads(path.read_text())["results"]
    assert result["counts"]["test"] == len(Shards(world / "singles-test"))
    assert set(result["validation"]) == {f"{strength:.3g}" for strength in STRENGTHS}
    assert result["scores"]["probe"]["top1"] > 2 / 64, "colours are seen through random weights"


def test_the_probe_needs_its_splits(runs, world, capsys):
    assert main(["evaluate", "probe", str(runs["both"]), "--data", str(world / "train")]) == 2
    assert "no split called train" in capsys.readouterr().err
    argv = ["evaluate", "probe", str(runs["both"]), "--data", str(world), "--prefix", "singles-", "--split", "val"]
    assert main(argv) == 2
    assert "no split called val" in capsys.readouterr().err
