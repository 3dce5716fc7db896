"""FLM laid out as in the released code (TencentARC/FLM bd8b19d), to compare speed with, for objective_step_time.py.

It is written from a description of that code and uses the modules of a VLModel, so that both versions have the same weights.
Text is always padded to one length. The two directions run one after the other, each with its own keys and values of the
image, with additive masks and a query at every position. The vocabulary head is applied to every position of all three
streams, followed by a plain cross-entropy that ignores padding.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvlp.batch import Batch
from fastvlp.model.layers import Block, CrossAttention, SelfAttention
from fastvlp.model.model import VLModel

HIDDEN = -10000.0
Kernel = Literal["written_out", "fused"]


def padded(batch: Batch, length: int, pad: int) -> Batch:
    """The same texts in `length` columns."""
    ids = F.pad(batch.ids, (0, length - batch.ids.shape[1]), value=pad)
    return Batch(image=batch.image, ids=ids, length=batch.length, seed=batch.seed)


def additive(visible: Tensor, like: Tensor) -> Tensor:
    return torch.where(visible, 0.0, HIDDEN).to(like.dtype)


def stream_masks(length_B: Tensor, L: int) -> tuple[Tensor, Tensor]:
    """Visible columns of the forward and the reverse stream, [B 1 L L] each. <s> sees all and is seen by itself alone."""
    row, column = torch.arange(L, device=length_B.device)[:, None], torch.arange(L, device=length_B.device)
    real = column < length_B[:, None, None]
    first = (row == 0) & real
    chain = (row > 0) & (column > 0) & real
    forward = first | (chain & (column <= row))
    padding = row >= length_B[:, None, None]
    reverse = first | (chain & torch.where(padding, column <= row, column >= row))
    return forward[:, None], reverse[:, None]


def corruption_mask(length_B: Tensor, L: int) -> Tensor:
    """The columns of [forward | reverse] that each query sees, where its span is its own token: [B 1 L 2L]."""
    row, column = torch.arange(L, device=length_B.device)[:, None], torch.arange(L, device=length_B.device)
    real = column < length_B[:, None, None]
    left = real & (((column >= 1) & (column < row)) | (row == 0))
    right = real & ((column > row) | (row == 0))
    return torch.cat([left, right], -1)[:, None]


class PlainFLM:
    """kernel: attention written out as in the released code, or PyTorch's fused one, to separate layout from kernel."""

    def __init__(self, model: VLModel, kernel: Kernel = "written_out"):
        assert model.reconstructor is not None and model.forward_head is None
        self.model, self.kernel = model, kernel

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """The mean cross-entropies of a batch that is already padded."""
        model, ids, length = self.model, batch.ids, batch.length
        image = model.encode_image(batch.image)
        memory = model.fusion.image_memory(image, None)
        assert model.reconstructor is not None
        forward_mask, reverse_mask = stream_masks(length, ids.shape[1])
        forward = self._stream(ids, forward_mask, model.fusion.text_type, memory)
        reverse = self._stream(ids, reverse_mask, model.reconstructor.reverse_type, memory)
        query = self._reconstruct(batch, forward, reverse)
        norm = model.fusion.norm
        return {
            "reconstruct": self._cross_entropy(query[:, 1:], ids[:, 1:]),
            "forward": self._cross_entropy(norm(forward[-1])[:, 1:-1], ids[:, 2:]),
            "reverse": self._cross_entropy(norm(reverse[-1])[:, 2:], ids[:, 1:-1]),
        }

    def _stream(self, ids: Tensor, visible: Tensor, kind: Tensor, memory: Tensor) -> list[Tensor]:
        model, states = self.model, []
        x = model.text.embed(ids, torch.arange(ids.shape[1], device=ids.device))
        mask = additive(visible, x)
        for block in model.text.blocks:
            x = self._block(block, x, mask=mask)
            states.append(x)
        x = model.fusion.text_in(x) + kind
        for block in model.fusion.blocks:
            x = self._block(block, x, mask=mask, memory=memory)
            states.append(x)
        return states

    def _reconstruct(self, batch: Batch, forward: list[Tensor], reverse: list[Tensor]) -> Tensor:
        model, text, L = self.model, self.model.config.text, batch.ids.shape[1]
        part, depth = model.reconstructor, len(model.text.blocks)
        position = torch.arange(L, device=batch.ids.device)
        ids = torch.full_like(batch.ids, text.mask)
        ids = torch.where((position == 0) | (position == batch.length[:, None] - 1), batch.ids, ids)
        x = model.text.embed(ids, position)
        mask = additive(corruption_mask(batch.length, L), x)
        stages = (
            (part.bottom, part.bottom_key_norm, depth - len(part.bottom)),
            (part.top, part.top_key_norm, depth + len(model.fusion.blocks) - len(part.top)),
        )
        for blocks, norms, start in stages:
            for i, (block, norm) in enumerate(zip(blocks, norms), start):
                x = self._block(block, x, memory=norm(torch.cat([forward[i], reverse[i]], 1)), memory_mask=mask)
            if blocks is part.bottom:
                x = model.fusion.text_in(x) + part.query_type
        return part.norm(x)

    def _cross_entropy(self, state: Tensor, target: Tensor) -> Tensor:
        logits = self.model.head(state).flatten(0, 1)
        return F.cross_entropy(logits.float(), target.flatten(), ignore_index=self.model.config.text.pad)

    def _block(
        self,
        block: Block,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        memory: Tensor | None = None,
        memory_mask: Tensor | None = None,
    ) -> Tensor:
        if block.attend is not None:
            x = block._add(x, block.attend_norm, lambda h: self._self_attention(block.attend, h, mask))
        if block.cross is not None:
            x = block._add(x, block.cross_norm, lambda h: self._cross_attention(block.cross, h, memory, memory_mask))
        return block._add(x, block.mlp_norm, lambda h: block.mlp_out(block.activation(block.mlp_in(h))))

    def _self_attention(self, part: SelfAttention, x: Tensor, mask: Tensor | None) -> Tensor:
        query, key, value = part.qkv(x).chunk(3, -1)
        return part.out(self._attention(part, query, key, value, mask))

    def _cross_attention(self, part: CrossAttention, x: Tensor, memory: Tensor, mask: Tensor | None) -> Tensor:
        key, value = part.kv(memory).chunk(2, -1)
        return part.out(self._attention(part, part.query(x), key, value, mask))

    def _attention(
        self, part: SelfAttention | CrossAttention, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
    ) -> Tensor:
        query, key, value = (x.unflatten(-1, (part.heads, -1)).transpose(1, 2) for x in (query, key, value))
        drop = part.dropout if part.training else 0.0
        if self.kernel == "fused":
            mask = mask if mask is None else mask.to(query.dtype)
            x = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=drop)
        else:
            score = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
            score = score if mask is None else score + mask
            x = F.dropout(score.softmax(-1), drop) @ value
        return x.transpose(1, 2).flatten(2)
