"""Contrastive formulas against what they stand for, written out in float64; what happens at the edges in fp32."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvlp.objectives.contrastive import (
    clamp_log_scale,
    clipped_scale,
    info_nce,
    nt_xent,
    queue_nce,
    sigmoid_loss,
)

B, M, K, E = 5, 11, 7, 4
TARGET = torch.tensor([3, 10, 0, 3, 7])  # two rows may have the same positive
# Kept whole, in tiles of three rows that divide neither 5 nor 10, row by row.
WHOLE = pytest.mark.parametrize("whole_logits", [None, 3 * M, 1], ids=["whole", "tiles", "row by row"])


def unit(*shape: int, seed: int = 0, kind: torch.dtype = torch.float64) -> Tensor:
    made = torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return F.normalize(made, dim=-1).to(kind).requires_grad_()


def number(value: float, kind: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor(value, dtype=kind, requires_grad=True)


def assert_same(mine: Tensor, known: Tensor, inputs: tuple[Tensor, ...], rtol: float = 1e-10) -> None:
    """Values, and gradients under unequal weights of the rows."""
    assert torch.allclose(mine, known, rtol=rtol, atol=1e-12)
    weight = torch.rand(known.shape, dtype=known.dtype, generator=torch.Generator().manual_seed(9))
    got = torch.autograd.grad((mine * weight).sum(), inputs)
    for one, other in zip(got, torch.autograd.grad((known * weight).sum(), inputs)):
        assert torch.allclose(one, other, rtol=rtol, atol=1e-12)


@WHOLE
def test_info_nce_is_the_cross_entropy_over_all_columns(whole_logits):
    query, key, scale = unit(B, E), unit(M, E, seed=1), number(3.0)
    mine = info_nce(query, key, TARGET, scale, whole_logits=whole_logits)
    assert_same(mine, F.cross_entropy(scale * query @ key.T, TARGET, reduction="none"), (query, key, scale))


@WHOLE
def test_sigmoid_loss_asks_about_each_pair(whole_logits):
    image, text, scale, bias = unit(B, E), unit(M, E, seed=1), number(3.0), number(-2.0)
    sign = 2 * F.one_hot(TARGET, M) - 1
    known = -F.logsigmoid(sign * (scale * image @ text.T + bias)).sum(1)
    mine = sigmoid_loss(image, text, TARGET, scale, bias, whole_logits=whole_logits)
    assert_same(mine, known, (image, text, scale, bias))


@WHOLE
def test_own_key_and_queue_are_the_candidates(whole_logits):
    query, key, queue, scale = unit(B, E), unit(M, E, seed=1), unit(K, E, seed=2), number(3.0)
    own, others = key.detach()[TARGET], queue.detach()
    logits = scale * torch.cat([(query * own).sum(1, keepdim=True), query @ others.T], 1)
    mine = queue_nce(query, key, queue, TARGET, scale, "pos+queue", whole_logits=whole_logits)
    assert_same(mine, F.cross_entropy(logits, torch.zeros_like(TARGET), reduction="none"), (query, scale))


@WHOLE
@pytest.mark.parametrize("alpha", [None, 0.0, 0.4, 1.0])
def test_batch_and_queue_are_the_candidates(whole_logits, alpha):
    query, key, queue, scale = unit(B, E), unit(M, E, seed=1), unit(K, E, seed=2), number(3.0)
    momentum = unit(B, E, seed=3).detach()
    every = torch.cat([key, queue]).detach()
    soft = (scale.detach() * momentum @ every.T).softmax(1)
    share = alpha or 0.0
    target = share * soft + (1 - share) * F.one_hot(TARGET, M + K).double()
    known = -((scale * query @ every.T).log_softmax(1) * target).sum(1)
    options = {} if alpha is None else {"momentum_BE": momentum, "alpha": alpha}
    mine = queue_nce(query, key, queue, TARGET, scale, "batch+queue", whole_logits=whole_logits, **options)
    assert_same(mine, known, (query, scale))


@pytest.mark.parametrize("mode", ["pos+queue", "batch+queue"])
def test_keys_and_queue_are_constants_and_the_queue_may_be_empty(mode):
    query, key, empty = unit(B, E), unit(M, E, seed=1), unit(0, E, seed=2)
    mine = queue_nce(query, key, empty, TARGET, number(3.0), mode)
    alone = torch.zeros_like(mine) if mode == "pos+queue" else info_nce(query, key.detach(), TARGET, number(3.0))
    assert torch.allclose(mine, alone)
    mine.sum().backward()
    assert key.grad is None and torch.isfinite(query.grad).all()


def test_soft_targets_need_candidates_in_common():
    query, key = unit(B, E), unit(M, E, seed=1)
    with pytest.raises(ValueError, match=r"batch\+queue"):
        queue_nce(query, key, key, TARGET, number(3.0), "pos+queue", momentum_BE=query)


@WHOLE
def test_nt_xent_tells_views_apart(whole_logits):
    a, b, scale = unit(B, E), unit(B, E, seed=1), number(2.0)
    mine = nt_xent(a, b, a, b, torch.arange(B), scale, whole_logits=whole_logits)
    views = torch.cat([a, b])
    losses = []
    for i in range(2 * B):
        others = torch.tensor([j for j in range(2 * B) if j != i])
        logits = scale * views[others] @ views[i]
        losses.append(logits.logsumexp(0) - scale * views[i] @ views[(i + B) % (2 * B)])
    assert_same(mine, torch.stack(losses), (a, b, scale))


def test_views_gathered_over_ranks():
    a, b, scale = unit(6, E), unit(6, E, seed=1), number(2.0)
    whole = nt_xent(a, b, a, b, torch.arange(6), scale)
    for rows in (slice(0, 2), slice(2, 6)):
        part = nt_xent(a[rows], b[rows], a, b, torch.arange(6)[rows], scale)
        assert torch.allclose(part, torch.cat([whole[:6][rows], whole[6:][rows]]))


def test_a_clipped_scale_has_no_gradient_beyond_the_bound_and_a_clamped_parameter_has():
    for log_scale, scale, gradient in ((2.0, math.exp(2), math.exp(2)), (5.0, 100.0, 0.0), (-1.0, 1.0, 0.0)):
        parameter = nn.Parameter(torch.tensor(log_scale))
        clipped = clipped_scale(parameter, 100.0)
        clipped.backward()
        assert clipped.item() == pytest.approx(scale) and parameter.grad.item() == pytest.approx(gradient)
        clamp_log_scale(parameter, 100.0)
        assert parameter.item() == pytest.approx(math.log(scale)) and parameter.requires_grad
        parameter.grad = None
        parameter.exp().backward()
        assert parameter.grad.item() == pytest.approx(scale)


@pytest.mark.parametrize("whole_logits", [None, 2 * M])
def test_identical_captions_at_the_bound_of_the_temperature(whole_logits):
    """exp(100) is more than fp32 holds; a softmax cannot tell equal columns apart: log M."""
    query, key = (unit(1, E, kind=torch.float32).detach().expand(n, E).clone().requires_grad_() for n in (B, M))
    scale = number(100.0, torch.float32)
    loss = info_nce(query, key, TARGET, scale, whole_logits=whole_logits)
    assert torch.allclose(loss, torch.tensor(math.log(M)), atol=2e-5)
    sigmoid = sigmoid_loss(query, key, TARGET, scale, number(-10.0, torch.float32), whole_logits=whole_logits)
    assert torch.allclose(sigmoid, torch.tensor(90.0 * (M - 1)), rtol=1e-6)
    for gradient in torch.autograd.grad((loss + sigmoid).sum(), (query, key, scale)):
        assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("whole_logits", [None, 2 * E])
def test_an_easy_row_keeps_its_small_loss_and_gradient(whole_logits):
    """At 20 the positive's share differs from 1 by 6e-9, which fp32 rounds away."""
    axes, scale = torch.eye(E, requires_grad=True), number(20.0, torch.float32)
    loss = info_nce(axes, axes.detach(), torch.arange(E), scale, whole_logits=whole_logits)
    share = (E - 1) * math.exp(-20)
    assert loss.tolist() == pytest.approx([share] * E, rel=1e-5)
    loss.sum().backward()
    assert axes.grad.diagonal().tolist() == pytest.approx([-20 * share] * E, rel=1e-5)
    assert scale.grad.item() == pytest.approx(-E * share, rel=1e-5)


def test_a_batch_of_one_has_nothing_to_learn_but_from_a_queue():
    one, other, own = unit(1, E), unit(1, E, seed=1), torch.tensor([0])
    scale, bias = number(10.0), number(-2.0)
    for loss in (
        info_nce(one, other, own, scale),
        nt_xent(one, other, one, other, own, scale),
        queue_nce(one, other, other[:0], own, scale, "batch+queue"),
    ):
        assert not loss.any() and not torch.autograd.grad(loss.sum(), one)[0].any()
    assert queue_nce(one, other, unit(K, E, seed=2), own, scale, "pos+queue").item() > 0
    known = F.softplus(-(scale * (one * other).sum(1) + bias))
    assert torch.allclose(sigmoid_loss(one, other, own, scale, bias), known)


@pytest.mark.parametrize("whole_logits", [None, 3 * M])
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float32])
def test_half_types_and_autocast_are_computed_in_fp32(kind, whole_logits):
    query, key, momentum = (unit(n, E, seed=n, kind=kind) for n in (B, M, B))
    queue, scale, bias = unit(K, E, seed=2, kind=kind), number(30.0, torch.float32), number(-5.0, torch.float32)

    def losses(query: Tensor, key: Tensor) -> Tensor:
        return torch.cat(
            [
                info_nce(query, key, TARGET, scale, whole_logits=whole_logits),
                sigmoid_loss(query, key, TARGET, scale, bias, whole_logits=whole_logits),
                queue_nce(query, key, queue, TARGET, scale, "pos+queue", whole_logits=whole_logits),
                queue_nce(query, key, queue, TARGET, scale, "batch+queue", momentum, whole_logits=whole_logits),
                nt_xent(query, key[:B], query, key[:B], torch.arange(B), scale, whole_logits=whole_logits),
            ]
        )

    inputs = (query, key, scale)
    known = losses(query.float(), key.float())
    with torch.autocast("cpu", torch.bfloat16):
        mine = losses(query, key)
    assert mine.dtype == torch.float32 and torch.allclose(mine, known, rtol=1e-5)
    tolerance = 1e-2 if kind == torch.bfloat16 else 1e-5  # autograd adds the gradients of five losses in their type
    for one, other in zip(*(torch.autograd.grad(losses.sum(), inputs) for losses in (mine, known))):
        assert one.dtype == other.dtype and (one - other).norm() <= tolerance * other.norm()
