"""Attention and the one transformer block that every tower is built of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvlp.errors import UserError

Norm = Literal["pre", "post"]
Activation = Literal["gelu", "gelu_tanh", "quick_gelu", "relu"]


@dataclass(frozen=True, kw_only=True)
class LayerConfig:
    """Shape of one block. `hidden` is the width of the MLP's hidden layer, `eps` that of the layer norms."""

    width: int
    heads: int
    hidden: int
    norm: Norm = "pre"
    eps: float = 1e-5
    activation: Activation = "gelu"
    dropout: float = 0.0

    def check(self, name: str) -> None:
        """Raises UserError where the width does not divide into heads; `name` is the config's, such as model.text.layer."""
        if self.heads < 1 or self.width % self.heads:
            raise UserError(f"`{name}.width` {self.width} does not divide into {self.heads} heads (`{name}.heads`)")


@dataclass
class KeyValue:
    """Keys and values of one attention layer, each [B H L Dh]; grows while decoding."""

    key: Tensor
    value: Tensor

    @classmethod
    def empty(cls, layer: LayerConfig, like_B: Tensor) -> KeyValue:
        """Those of no token, for as many rows as `like_B` has, on its device and of its dtype."""
        empty = like_B.new_empty(len(like_B), layer.heads, 0, layer.width // layer.heads)
        return cls(empty, empty)

    @property
    def length(self) -> int:
        """L, the tokens so far."""
        return self.key.shape[2]

    def extend(self, key: Tensor, value: Tensor) -> None:
        self.key, self.value = torch.cat([self.key, key], 2), torch.cat([self.value, value], 2)

    def select(self, rows: Tensor) -> KeyValue:
        return KeyValue(self.key[rows], self.value[rows])


def quick_gelu(x: Tensor) -> Tensor:
    """x * sigmoid(1.702 x), the activation of OpenAI's CLIP weights."""
    return x * torch.sigmoid(1.702 * x)


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU by its tanh approximation, which flax and BERT's first code compute (arXiv 1606.08415, section 2)."""
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": gelu_tanh,
    "quick_gelu": quick_gelu,
    "relu": F.relu,
}


def _heads(x_BLD: Tensor, heads: int) -> Tensor:
    return x_BLD.unflatten(-1, (heads, -1)).transpose(1, 2)


def attention(
    query: Tensor, key: Tensor, value: Tensor, *, mask: Tensor | None = None, causal: bool = False, drop: float = 0.0
) -> Tensor:
    """Softmax attention, [B H Q Dh] from keys and values [B H K Dh]; `mask` True = visible."""
    if query.device.type == "cpu" and query.dtype == torch.bfloat16:
        # The CPU's bf16 kernel has a backward pass three to seven times as slow as its fp32 one (torch 2.13).
        with torch.autocast("cpu", enabled=False):
            wide = attention(query.float(), key.float(), value.float(), mask=mask, causal=causal, drop=drop)
            return wide.to(query.dtype)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal, dropout_p=drop)


class SelfAttention(nn.Module):
    def __init__(self, config: LayerConfig):
        super().__init__()
        self.heads, self.dropout = config.heads, config.dropout
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.out = nn.Linear(config.width, config.width)

    def forward(self, x_BLD: Tensor, mask: Tensor | None, causal: bool, past: KeyValue | None = None) -> Tensor:
        query, key, value = (_heads(part, self.heads) for part in self.qkv(x_BLD).chunk(3, -1))
        if past is not None:
            past.extend(key, value)
            key, value = past.key, past.value
        drop = self.dropout if self.training else 0.0
        x = attention(query, key, value, mask=mask, causal=causal, drop=drop)
        return self.out(x.transpose(1, 2).flatten(2))


class CrossAttention(nn.Module):
    def __init__(self, config: LayerConfig):
        super().__init__()
        self.heads, self.dropout = config.heads, config.dropout
        self.query = nn.Linear(config.width, config.width)
        self.kv = nn.Linear(config.width, 2 * config.width)
        self.out = nn.Linear(config.width, config.width)

    def keys(self, memory_BKD: Tensor) -> KeyValue:
        key, value = self.kv(memory_BKD).chunk(2, -1)
        return KeyValue(_heads(key, self.heads), _heads(value, self.heads))

    def forward(self, x_BLD: Tensor, memory: KeyValue, mask: Tensor | None) -> Tensor:
        """`x` may hold several rows for each row of `memory` (b*s+0 ... b*s+s-1 read row b): they fold into one long
        query, so that keys and values are computed and held once for both directions, or all captions, of an image."""
        rows, length, width = x_BLD.shape
        query = self.query(x_BLD).reshape(memory.key.shape[0], -1, width)
        drop = self.dropout if self.training else 0.0
        x = attention(_heads(query, self.heads), memory.key, memory.value, mask=mask, drop=drop)
        return self.out(x.transpose(1, 2).reshape(rows, length, width))


class Block(nn.Module):
    """Self-attention, cross-attention, MLP, each with its residual; the first two by choice.

    ViT and text towers use (attend), fusion layers (attend, cross), reconstructor layers (cross).
    """

    def __init__(self, config: LayerConfig, *, attend: bool = True, cross: bool = False):
        super().__init__()
        self.post = config.norm == "post"
        norm = lambda: nn.LayerNorm(config.width, eps=config.eps)  # noqa: E731
        self.attend = SelfAttention(config) if attend else None
        self.attend_norm = norm() if attend else None
        self.cross = CrossAttention(config) if cross else None
        self.cross_norm = norm() if cross else None
        self.mlp_in = nn.Linear(config.width, config.hidden)
        self.mlp_out = nn.Linear(config.hidden, config.width)
        self.mlp_norm = norm()
        self.activation = ACTIVATIONS[config.activation]
        self.drop = nn.Dropout(config.dropout)

    def keys(self, memory_BKD: Tensor) -> KeyValue:
        """Keys and values of what the block reads: once a layer, for every row that reads it."""
        assert self.cross is not None, "this block reads nothing but itself"
        return self.cross.keys(memory_BKD)

    def _add(self, x: Tensor, norm: nn.Module | None, branch: Callable[[Tensor], Tensor]) -> Tensor:
        assert norm is not None
        return norm(x + self.drop(branch(x))) if self.post else x + self.drop(branch(norm(x)))

    def forward(
        self,
        x_BLD: Tensor,
        *,
        mask: Tensor | None = None,
        causal: bool = False,
        memory: KeyValue | None = None,
        memory_mask: Tensor | None = None,
        past: KeyValue | None = None,
    ) -> Tensor:
        if self.attend is not None:
            attend = self.attend
            x_BLD = self._add(x_BLD, self.attend_norm, lambda h: attend(h, mask, causal, past))
        if self.cross is not None:
            assert memory is not None, "a block with cross-attention needs `memory`"
            cross, keys = self.cross, memory
            x_BLD = self._add(x_BLD, self.cross_norm, lambda h: cross(h, keys, memory_mask))
        return self._add(x_BLD, self.mlp_norm, lambda h: self.mlp_out(self.activation(self.mlp_in(h))))


def stack(config: LayerConfig, depth: int, *, attend: bool = True, cross: bool = False) -> list[Block]:
    """`depth` blocks; a ModuleList, declared as the list of blocks that it is."""
    return cast("list[Block]", nn.ModuleList(Block(config, attend=attend, cross=cross) for _ in range(depth)))


def initial_std(width: int) -> float:
    """0.02 at BERT's width of 768, and as much wider for a narrower model as keeps sums of `width` terms of one size: at
    width 96 a fixed 0.02 took 2.5 times the steps to the same loss (docs/log.md, 2026-11-21)."""
    return 0.02 * (768 / width) ** 0.5


def initialise_as_mae(module: nn.Module) -> None:
    """Xavier-uniform matrices, all else but norms N(0, 0.02), biases 0 (MAE, arXiv 2111.06377, appendix A.1; FLIP). One
    matrix makes query, key and value, so that theirs are drawn as of one [3D D], as in both released codes."""
    matrices = {id(part.weight) for part in module.modules() if isinstance(part, nn.Linear)}
    norms = {id(p) for part in module.modules() if isinstance(part, nn.LayerNorm) for p in part.parameters()}
    for name, parameter in module.named_parameters():
        if id(parameter) in matrices:
            nn.init.xavier_uniform_(parameter)
        elif id(parameter) not in norms:
            nn.init.zeros_(parameter) if name.endswith("bias") else nn.init.normal_(parameter, std=0.02)


def initialise(module: nn.Module, width: int) -> None:
    """Matrices, tables and free vectors N(0, initial_std), biases 0, norms 1, rows of padding 0."""
    std = initial_std(width)
    norms = {id(p) for part in module.modules() if isinstance(part, nn.LayerNorm) for p in part.parameters()}
    for name, parameter in module.named_parameters():
        if id(parameter) not in norms:
            nn.init.zeros_(parameter) if name.endswith("bias") else nn.init.normal_(parameter, std=std)
    for part in module.modules():
        if isinstance(part, nn.Embedding) and part.padding_idx is not None:
            with torch.no_grad():
                part.weight[part.padding_idx].zero_()
