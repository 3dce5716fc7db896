"""Attention, and the transformer layer of which all parts of a model consist."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree
from torch.utils.checkpoint import checkpoint

from fastvlp.batch import register_dataclass_node
from fastvlp.config import Count, Positive, ShareBelowOne
from fastvlp.errors import UserError
from fastvlp.model.recompute import computed_twice

Norm = Literal["pre", "post"]
Activation = Literal["gelu", "gelu_tanh", "quick_gelu", "relu"]


@dataclass(frozen=True, kw_only=True)
class LayerConfig:
    """Shape of one transformer layer."""

    width: Count
    """Width: the dimension of each state."""
    heads: Count
    """Number of attention heads."""
    hidden: Count
    """Width of the hidden layer of the MLP."""
    norm: Norm = "pre"
    """Layer norm before each sublayer (pre), or after its residual sum (post, as in BERT)."""
    eps: Positive = 1e-5
    """Epsilon of the norms."""
    activation: Activation = "gelu"
    """Activation function of the MLP."""
    dropout: ShareBelowOne = 0.0
    """Share of each sublayer's outputs that is set to zero in training."""

    def check(self, name: str) -> None:
        """Raises UserError if the width cannot be divided by the heads. `name`: of the config, such as model.text.layer."""
        if self.heads < 1 or self.width % self.heads:
            raise UserError(f"`{name}.width` {self.width} does not divide into {self.heads} heads (`{name}.heads`)")


@dataclass
class KeyValue:
    """Keys and values of one attention layer, each [B H L Dh]. They grow while a text is decoded."""

    key: Tensor
    value: Tensor

    @classmethod
    def empty(cls, layer: LayerConfig, like_B: Tensor) -> KeyValue:
        """Returns empty keys and values, for as many rows as `like_B` has, on its device and with its dtype."""
        empty = like_B.new_empty(len(like_B), layer.heads, 0, layer.width // layer.heads)
        return cls(empty, empty)

    @property
    def length(self) -> int:
        """The number of tokens so far, L."""
        return self.key.shape[2]

    def extend(self, key: Tensor, value: Tensor) -> None:
        """Appends the keys and values of further tokens, in place."""
        self.key, self.value = torch.cat([self.key, key], 2), torch.cat([self.value, value], 2)


# Pytrees find the tensors: for FSDP those that go into and out of a layer, and in `select_rows`.
register_dataclass_node(KeyValue)


def select_rows(past: Any, rows: Tensor) -> Any:
    """Returns `past` with only the given rows, in their order, of each tensor in it. It may be any pytree, such as a
    `KeyValue` or lists, tuples and dicts. Other values, such as a number of tokens, stay the same."""
    return _pytree.tree_map_only(Tensor, lambda part: part[rows], past)


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


# Largest number of scores of one head, queries times keys, for which plain products are used on the CPU. They are faster there;
# more scores would take much memory.
FEW_SCORES = 1 << 16


def _heads(x_BLD: Tensor, heads: int) -> Tensor:
    return x_BLD.unflatten(-1, (heads, -1)).transpose(1, 2)


def attention(
    query: Tensor, key: Tensor, value: Tensor, *, mask: Tensor | None = None, causal: bool = False, drop: float = 0.0
) -> Tensor:
    """Softmax attention of queries [B H Q Dh] to keys and values [B H K Dh] -> [B H Q Dh]. `mask` is True where a query attends
    to a key; `drop` is the dropout of attention weights."""
    if query.device.type == "cpu" and query.dtype == torch.bfloat16:
        # On the CPU, the backward pass of the bf16 kernel takes three to seven times as long as that of the fp32 kernel. If
        # there are few scores and attention is not causal, plain products are faster than both (torch 2.13; docs/log.md).
        if not causal and not drop and query.shape[2] * key.shape[2] <= FEW_SCORES:
            return plain_attention(query, key, value, mask)
        with torch.autocast("cpu", enabled=False):
            wide = attention(query.float(), key.float(), value.float(), mask=mask, causal=causal, drop=drop)
            return wide.to(query.dtype)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal, dropout_p=drop)


def plain_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """Computes `attention` by batched matrix products, with all scores [B H Q K] in memory. A row that attends to no key gets
    the mean of all values."""
    B, H, Q, _ = query.shape
    rows = [x.reshape(B * H, x.shape[2], x.shape[3]) for x in (query * query.shape[3] ** -0.5, key, value)]
    scores = torch.bmm(rows[0], rows[1].transpose(1, 2))
    if mask is not None:
        hidden = query.new_zeros(mask.shape).masked_fill_(~mask, torch.finfo(query.dtype).min)
        scores = (scores.view(B, H, Q, -1) + hidden).view(B * H, Q, -1)
    return torch.bmm(scores.softmax(-1), rows[2]).view(B, H, Q, -1)


class SelfAttention(nn.Module):
    """Multi-head self-attention; query, key and value are one matrix."""

    def __init__(self, config: LayerConfig):
        super().__init__()
        self.heads, self.dropout = config.heads, config.dropout
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.out = nn.Linear(config.width, config.width)

    def forward(self, x_BLD: Tensor, mask: Tensor | None, causal: bool, past: KeyValue | None = None) -> Tensor:
        """Attention of x [B L D] to itself -> [B L D]. `past`: keys and values of the tokens before `x`; those of `x` are
        appended to them."""
        query, key, value = (_heads(part, self.heads) for part in self.qkv(x_BLD).chunk(3, -1))
        if past is not None:
            past.extend(key, value)
            key, value = past.key, past.value
        drop = self.dropout if self.training else 0.0
        x = attention(query, key, value, mask=mask, causal=causal, drop=drop)
        return self.out(x.transpose(1, 2).flatten(2))


class CrossAttention(nn.Module):
    """Multi-head attention of a text to other states."""

    def __init__(self, config: LayerConfig):
        super().__init__()
        self.heads, self.dropout = config.heads, config.dropout
        self.query = nn.Linear(config.width, config.width)
        self.kv = nn.Linear(config.width, 2 * config.width)
        self.out = nn.Linear(config.width, config.width)

    def keys(self, memory_BKD: Tensor) -> KeyValue:
        key, value = self.kv(memory_BKD).chunk(2, -1)
        return KeyValue(_heads(key, self.heads), _heads(value, self.heads))

    def forward(self, x_BLD: Tensor, memory: KeyValue, mask: Tensor | None, place_T: Tensor | None = None) -> Tensor:
        """Attention of x [B*s L D] to `memory` of B rows: rows b*s ... b*s+s-1 of `x` read row b. They are joined to one long
        query, so that the keys and values of an image are computed and stored only once for all of its captions or directions.

        With `place_T`, x is [T D]: the queries at these places of [B Q]; `mask` is then [B 1 Q K].
        """
        rows, width, query = memory.key.shape[0], x_BLD.shape[-1], self.query(x_BLD)
        if place_T is not None:
            assert mask is not None, "the mask says how many positions there are"
            query = query.new_zeros(rows * mask.shape[2], width).index_copy(0, place_T, query)
        drop = self.dropout if self.training else 0.0
        heads = _heads(query.reshape(rows, -1, width), self.heads)
        x = attention(heads, memory.key, memory.value, mask=mask, drop=drop).transpose(1, 2)
        return self.out(x.reshape(x_BLD.shape) if place_T is None else x.reshape(-1, width).index_select(0, place_T))


class Block(nn.Module):
    """A transformer layer: self-attention (`attend`), cross-attention (`cross`) and an MLP, each with a residual connection.

    Layers of image and text encoders have `attend`, fusion layers have `attend` and `cross`, and reconstructor layers have
    `cross`.

    Attributes:
        recompute: whether training keeps only the inputs, and computes everything else again in the backward pass.
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
        self.recompute = False

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        # Recomputation is around the compiled layer, not inside it.
        if self.recompute and self.training and torch.is_grad_enabled():
            return checkpoint(super().__call__, *inputs, use_reentrant=False, context_fn=computed_twice, **options)
        return super().__call__(*inputs, **options)

    def keys(self, memory_BKD: Tensor) -> KeyValue:
        """Returns the keys and values of the states [B K D] to which cross-attention attends. All rows that attend to them
        share them."""
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
        place_T: Tensor | None = None,
    ) -> Tensor:
        """States [B L D] -> [B L D].

        Args:
            mask: mask of self-attention, True where a row attends to a column. Cannot be combined with `causal`.
            causal: whether each token attends only to itself and the tokens before it.
            memory: keys and values for cross-attention, as `keys` returns them.
            memory_mask: mask of cross-attention.
            past: keys and values of the tokens before `x` (decoding).
            place_T: for a layer without self-attention: the places of the states in `x`, which is then [T D].
        """
        if self.attend is not None:
            attend = self.attend
            x_BLD = self._add(x_BLD, self.attend_norm, lambda h: attend(h, mask, causal, past))
        if self.cross is not None:
            assert memory is not None, "a block with cross-attention needs `memory`"
            cross, keys = self.cross, memory
            x_BLD = self._add(x_BLD, self.cross_norm, lambda h: cross(h, keys, memory_mask, place_T))
        return self._add(x_BLD, self.mlp_norm, lambda h: self.mlp_out(self.activation(self.mlp_in(h))))


def stack(config: LayerConfig, depth: int, *, attend: bool = True, cross: bool = False) -> list[Block]:
    """Returns a ModuleList of `depth` layers, with the type of a list of layers."""
    return cast("list[Block]", nn.ModuleList(Block(config, attend=attend, cross=cross) for _ in range(depth)))


def initial_std(width: int) -> float:
    """Returns the standard deviation of new weights: 0.02 at BERT's width of 768, and larger for a narrower model, so that sums
    of `width` terms have the same variance. At width 96, a fixed 0.02 took 2.5 times as many steps to the same loss
    (docs/log.md, entry 2)."""
    return 0.02 * (768 / width) ** 0.5


def initialise_as_mae(module: nn.Module) -> None:
    """Draws all weights as MAE and FLIP do (arXiv 2111.06377, appendix A.1): Xavier-uniform matrices, biases 0, and N(0, 0.02)
    for everything else except norms. Query, key and value are drawn as one matrix [3D D], as in both released codes."""
    matrices = {id(part.weight) for part in module.modules() if isinstance(part, nn.Linear)}
    norms = {id(p) for part in module.modules() if isinstance(part, nn.LayerNorm) for p in part.parameters()}
    for name, parameter in module.named_parameters():
        if id(parameter) in matrices:
            nn.init.xavier_uniform_(parameter)
        elif id(parameter) not in norms:
            nn.init.zeros_(parameter) if name.endswith("bias") else nn.init.normal_(parameter, std=0.02)


def initialise(module: nn.Module, width: int) -> None:
    """Draws all weights as BERT does: N(0, initial_std(width)) for matrices, tables and single vectors, and 0 for biases and
    rows of padding. Norms stay 1."""
    std = initial_std(width)
    norms = {id(p) for part in module.modules() if isinstance(part, nn.LayerNorm) for p in part.parameters()}
    for name, parameter in module.named_parameters():
        if id(parameter) not in norms:
            nn.init.zeros_(parameter) if name.endswith("bias") else nn.init.normal_(parameter, std=std)
    for part in module.modules():
        if isinstance(part, nn.Embedding) and part.padding_idx is not None:
            with torch.no_grad():
                part.weight[part.padding_idx].zero_()
