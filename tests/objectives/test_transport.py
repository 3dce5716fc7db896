"""Optimal transport between words and regions: known answers, marginals, padding, gradients, precision."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch

from fastvlp.objectives.transport import cosine_cost, transport_distance, transport_plan

COST = torch.tensor([[[0.1, 0.9, 0.5], [0.8, 0.2, 0.6]]])


def real(*counts: int, width: int) -> torch.Tensor:
    return torch.arange(width) < torch.tensor(counts)[:, None]


@pytest.mark.parametrize(("iterations", "distance"), [(1, 0.375016), (5, 0.283868), (20, 0.283333), (50, 0.283333)])
def test_known_distances(iterations, distance):
    """Distances of the released routine (spec A2.7)."""
    plan = transport_plan(COST, torch.ones_like(COST).bool(), iterations=iterations)
    assert (COST * plan).sum().item() == pytest.approx(distance, abs=2e-6)


def test_known_distance_of_states():
    words = torch.tensor([[[1.0, 0, 0], [0, 1, 0], [5, 5, 5]]])
    regions = torch.tensor([[[0.9, 0.1, 0], [0.1, 0.9, 0.2], [0.5, 0.5, 0.5], [7, -7, 7]]])
    distance = transport_distance(words, regions, real(2, width=3), real(3, width=4))
    assert distance.item() == pytest.approx(0.152757, abs=2e-6)


def test_the_plan_moves_equal_masses():
    cost = torch.rand(3, 5, 7, generator=torch.Generator().manual_seed(0))
    words, regions = real(5, 2, 4, width=5), real(3, 7, 4, width=7)
    plan = transport_plan(cost, words[:, :, None] & regions[:, None], iterations=200)
    torch.testing.assert_close(plan.sum(2), words / words.sum(1, keepdim=True), atol=1e-4, rtol=0)
    torch.testing.assert_close(plan.sum(1), regions / regions.sum(1, keepdim=True), atol=1e-4, rtol=0)


def test_the_distance_nears_the_best_assignment():
    """Between equal numbers of words and regions the optimum is a permutation: here all of them are tried."""
    cost = torch.rand(4, 5, 5, generator=torch.Generator().manual_seed(1)).double()
    plan = transport_plan(cost, torch.ones_like(cost).bool(), iterations=3000)
    row = torch.arange(5)
    best = torch.stack([cost[:, row, list(order)].mean(1) for order in permutations(range(5))]).amin(0)
    torch.testing.assert_close((cost * plan).sum((1, 2)), best, atol=1e-3, rtol=0)


def states(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, 6, 8, generator=generator), torch.randn(3, 4, 8, generator=generator)


def test_padding_and_emptiness():
    words, regions = states()
    distance = transport_distance(words, regions, real(6, 2, 3, width=6), real(1, 4, 0, width=4))
    alone = transport_distance(words[1:2, :2], regions[1:2], real(2, width=2), real(4, width=4))
    torch.testing.assert_close(distance[1:2], alone)
    assert distance[2] == 0
    words.requires_grad_()
    nothing = transport_distance(words, regions, real(0, 0, 0, width=6), real(0, 1, 4, width=4))
    nothing.sum().backward()
    assert not nothing.any() and torch.isfinite(words.grad).all()


def test_the_gradient_flows_through_the_cost_alone():
    words, regions = (x.double().requires_grad_() for x in states())
    masks = real(6, 2, 3, width=6), real(4, 4, 2, width=4)
    (mine,) = torch.autograd.grad(transport_distance(words, regions, *masks).sum(), words)
    cost = cosine_cost(words, regions)
    plan = transport_plan(cost, masks[0][:, :, None] & masks[1][:, None])
    (expected,) = torch.autograd.grad((cost * plan.detach()).sum(), words)
    torch.testing.assert_close(mine, expected)
    assert not mine[1, 2:].any(), "padding has no gradient"


def test_fp32_under_autocast():
    words, regions = states()
    masks = real(6, 2, 3, width=6), real(4, 4, 2, width=4)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = transport_distance(words, regions, *masks)
        half = transport_distance(words.bfloat16(), regions.bfloat16(), *masks)
    assert half.dtype == mixed.dtype == torch.float32
    assert torch.equal(mixed, transport_distance(words, regions, *masks))
    torch.testing.assert_close(half, mixed, atol=2e-2, rtol=0)
