"""Attention by plain products, which the CPU computes in bf16, is the attention of PyTorch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastvlp.model import layers
from fastvlp.model.layers import attention, plain_attention


def made(queries: int, keys: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Query, key and value, as heads are cut from states: with strides of states."""
    torch.manual_seed(0)
    shapes = [(3, n, 2, 8) for n in (queries, keys, keys)]
    return [torch.randn(shape, dtype=dtype).transpose(1, 2).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("kind", ["all", "row mask", "query mask"])
def test_plain_attention_and_its_gradients_are_those_of_pytorch(kind: str):
    queries, keys = 4, 7
    masks = {
        "row mask": (torch.arange(keys) < torch.tensor([7, 3, 1])[:, None])[:, None, None],
        "query mask": torch.rand(3, 1, queries, keys, generator=torch.Generator().manual_seed(1)) > 0.4,
    }
    if kind == "query mask":
        masks[kind][..., 0] = True
    mask = masks.get(kind)
    parts = made(queries, keys, torch.float64)
    plain = plain_attention(*parts, mask)
    known = F.scaled_dot_product_attention(*parts, attn_mask=mask)
    assert torch.allclose(plain, known, atol=1e-12)
    weight = torch.randn_like(known)
    for ours, theirs in zip(torch.autograd.grad(plain, parts, weight), torch.autograd.grad(known, parts, weight)):
        assert torch.allclose(ours, theirs, atol=1e-12)


def test_bf16_on_a_cpu_is_near_fp32_with_few_scores_and_with_many(monkeypatch):
    parts = made(6, 9, torch.bfloat16)
    exact = attention(*(part.float() for part in parts))
    for most in (54, 53):
        monkeypatch.setattr(layers, "FEW_SCORES", most)
        ours = attention(*parts)
        assert ours.dtype == torch.bfloat16
        assert torch.allclose(ours.float(), exact, atol=0.02)
