"""Tiles: the same numbers and gradients as the whole matrix, and never anything of its size."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastvlp.objectives.contrastive import info_nce, sigmoid_loss
from fastvlp.objectives.tiled import fold_columns

WHOLE = 1 << 62
FOLDS = pytest.mark.parametrize("fold", ["logsumexp", "softplus"])


def made(B: int, M: int, E: int, kind: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(B + M)
    query, key = (F.normalize(torch.randn(n, E, generator=generator, dtype=torch.float64)) for n in (B, M))
    return query.to(kind).requires_grad_(), key.to(kind).requires_grad_()


@FOLDS
@pytest.mark.parametrize("whole_logits", [WHOLE, 2 * 6, 1], ids=["whole", "tiles", "row by row"])
def test_gradients_are_those_of_differences(fold, whole_logits):
    query, key = made(5, 6, 3)
    without = torch.tensor([[0, 5], [1, 1], [2, 0], [5, 4], [3, 2]])
    bias = torch.tensor(-0.7, dtype=torch.float64, requires_grad=True) if fold == "softplus" else None
    assert torch.autograd.gradcheck(
        partial(fold_columns, fold, whole_logits=whole_logits), (query, key, without, bias), atol=1e-8
    )


@FOLDS
@pytest.mark.parametrize("B, M, rows", [(9, 9, 2), (7, 23, 3), (23, 7, 22), (1, 5, 1), (0, 5, 1), (4, 0, 1), (4, 1, 1)])
def test_tiles_equal_the_whole(fold, B, M, rows):
    query, key = made(B, M, 4)
    without = torch.arange(B)[:, None] % M if M else None
    losses = [fold_columns(fold, query, key, without, whole_logits=limit) for limit in (WHOLE, rows * M)]
    assert losses[0].shape == (B,) and torch.allclose(*losses, rtol=1e-12)
    weight = torch.linspace(0.5, 2, B, dtype=torch.float64)
    for one, other in zip(*(torch.autograd.grad((loss * weight).sum(), (query, key)) for loss in losses)):
        assert torch.isfinite(one).all() and torch.allclose(one, other, rtol=1e-10, atol=1e-14)


def nce(query: Tensor, key: Tensor, limit: int) -> Tensor:
    return info_nce(query, key, torch.arange(len(query)), query.new_tensor(9.0, requires_grad=True), whole_logits=limit)


def sigmoid(query: Tensor, key: Tensor, limit: int) -> Tensor:
    scale, bias = (query.new_tensor(x, requires_grad=True) for x in (9.0, -9.0))
    return sigmoid_loss(query, key, torch.arange(len(query)), scale, bias, whole_logits=limit)


class Largest(TorchDispatchMode):
    """The most numbers of any tensor that an operation gives back."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            self.numbers = max(self.numbers, x.numel() if isinstance(x, Tensor) else 0)
        return out


@pytest.mark.parametrize("loss", [nce, sigmoid])
def test_nothing_of_the_size_of_the_matrix_is_kept_or_made(loss):
    B, M, E, rows = 60, 100, 4, 7
    query, key = made(B, M, E, torch.float32)
    kept: list[int] = []

    def keep(x: Tensor) -> Tensor:
        kept.append(x.numel())
        return x

    for limit, most_kept, most_made in ((WHOLE, B * M, B * M), (rows * M, M * E, rows * M)):
        kept.clear()
        with Largest() as largest:
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
                total = loss(query, key, limit).sum()
            total.backward()
        assert max(kept) == most_kept and largest.numbers == most_made


@pytest.mark.parametrize("limit", [WHOLE, 5 * 9])
@pytest.mark.parametrize("loss", [info_nce, sigmoid_loss])
def test_ranks_sum_to_one_process(loss, limit):
    """Rows split unevenly, columns gathered: a column's gradient is the sum over the ranks that saw it."""
    query, key = made(9, 9, 4)
    learned = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (4.0, -1.0)][
        : 1 + (loss is sigmoid_loss)
    ]
    own, inputs = torch.arange(9), (query, key, *learned)
    alone = loss(query, key, own, *learned, whole_logits=WHOLE)
    ranks = [loss(query[rows], key, own[rows], *learned, whole_logits=limit) for rows in (slice(0, 3), slice(3, 9))]
    assert torch.allclose(torch.cat(ranks), alone)
    expected = torch.autograd.grad(alone.sum(), inputs)
    parts = [torch.autograd.grad(rank.sum(), inputs) for rank in ranks]
    for one, other, known in zip(*parts, expected):
        assert torch.allclose(one + other, known, rtol=1e-10, atol=1e-14)


def test_constant_columns_cost_no_gradient():
    query, key = made(6, 8, 4)
    fold_columns("logsumexp", query, key.detach(), whole_logits=16).sum().backward()
    assert key.grad is None and query.grad.shape == (6, 4)


@FOLDS
def test_a_backward_pass_under_autocast_stays_in_fp32(fold):
    query, key = made(6, 8, 4, torch.float32)
    known = torch.autograd.grad(fold_columns(fold, query, key, whole_logits=16).sum(), (query, key))
    with torch.autocast("cpu", torch.bfloat16):
        mine = torch.autograd.grad(fold_columns(fold, query, key, whole_logits=16).sum(), (query, key))
    assert all(map(torch.equal, mine, known))
