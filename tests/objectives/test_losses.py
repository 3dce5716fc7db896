"""Formulas against plain ones in float64, and `combine` against what it stands for."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastvlp.model.fusion import LMHead
from fastvlp.objectives import losses
from fastvlp.objectives.losses import token_loss
from fastvlp.objectives.objective import Loss, combine


@pytest.mark.parametrize("whole_logits", [1 << 26, 70, 7], ids=["whole", "chunked", "row by row"])
def test_token_loss_and_its_gradients(whole_logits: int):
    torch.manual_seed(0)
    T, D, V = 13, 5, 7
    hidden, weight, bias = (
        torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((T, D), (V, D), (V,))
    )
    target, upstream = torch.randint(V, (T,)), torch.rand(T, dtype=torch.float64)
    mine = token_loss(hidden, weight, bias, target, whole_logits=whole_logits)
    logits = hidden @ weight.T + bias
    known = logits.logsumexp(1) - logits[torch.arange(T), target]
    assert torch.allclose(mine, known, rtol=1e-12)
    gradients = torch.autograd.grad((mine * upstream).sum(), (hidden, weight, bias))
    expected = torch.autograd.grad((known * upstream).sum(), (hidden, weight, bias))
    for one, other in zip(gradients, expected):
        assert torch.allclose(one, other, rtol=1e-10, atol=1e-12)


def test_token_loss_of_nothing_is_empty():
    loss = token_loss(
        torch.zeros(0, 4, requires_grad=True), torch.zeros(6, 4), torch.zeros(6), torch.zeros(0, dtype=torch.long)
    )
    assert loss.shape == (0,) and loss.sum().item() == 0.0


@pytest.mark.parametrize("whole_logits", [1 << 26, 64])
def test_token_loss_under_autocast(whole_logits: int):
    torch.manual_seed(0)
    hidden, weight, bias = (
        torch.randn(40, 16, requires_grad=True),
        torch.randn(32, 16, requires_grad=True),
        torch.randn(32),
    )
    target = torch.randint(32, (40,))
    with torch.autocast("cpu", torch.bfloat16):
        mine = token_loss(hidden, weight, bias, target, whole_logits=whole_logits)
    assert mine.dtype == torch.float32
    assert torch.allclose(mine, F.cross_entropy(hidden @ weight.T + bias, target, reduction="none"), atol=0.15)
    mine.sum().backward()
    assert hidden.grad.dtype == torch.float32 and torch.isfinite(hidden.grad).all()


def test_combine_divides_once_by_the_count_of_the_whole_step():
    parts = [(torch.tensor(6.0), torch.tensor(2)), (torch.tensor(4.0), torch.tensor(3))]
    counts = {"a": torch.tensor(5), "b": torch.tensor(4)}
    total = sum(combine({"a": Loss(t, n, 0.5), "b": Loss(t * 2, torch.tensor(2), 2.0)}, counts) for t, n in parts)
    assert total == pytest.approx(0.5 * 10 / 5 + 2.0 * 20 / 4)


def test_combine_of_no_targets_is_zero_not_nan():
    assert combine({"a": Loss(torch.tensor(0.0), torch.tensor(0))}) == 0.0


@pytest.mark.parametrize("targets", [0, 5, 64])
def test_rounding_up_the_number_of_targets_changes_no_loss(monkeypatch, targets):
    torch.manual_seed(0)
    head, target = LMHead(16, 30, 1e-5), torch.arange(targets) % 30
    found = []
    for multiple in (1, 64):
        monkeypatch.setattr(losses, "SAME_SHAPE", multiple)
        state = torch.linspace(-1, 1, targets * 16).view(targets, 16).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            nll = losses.head_loss(head, state, target)
        found.append((nll, *torch.autograd.grad(nll.sum(), (state, *head.parameters()))))
    for exact, rounded in zip(*found):
        assert exact.shape == rounded.shape
        assert torch.allclose(exact.float(), rounded.float(), rtol=0.02, atol=0.02)
