"""Text encoders of the package `transformers` that are no text transformer of ours: ELECTRA, MPNet, ALBERT and more.

BERT, RoBERTa, XLM-RoBERTa and CLIP are ones of ours (`convert`), which decode faster and can be compiled.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from inspect import signature
from typing import Annotated, Any, cast

import torch
from torch import Tensor, nn
from tyro.conf import Fixed

from fastvlp.errors import UserError
from fastvlp.model.encoders.interface import TextEncoder, TextEncoderConfig
from fastvlp.model.encoders.text_transformer import with_positions
from fastvlp.model.encoders.transformers_models import architecture_of, build_model, model_config
from fastvlp.model.freezing import evaluation_mode


@dataclass(frozen=True, kw_only=True)
class TransformersTextConfig(TextEncoderConfig):
    """A text encoder of transformers."""

    architecture: Annotated[Mapping[str, Any], Fixed] = field(hash=False)
    """Config of the model, as its config.json has it."""
    position_offset: int = 0
    """Row of the position table that position 0 has (MPNet: 2)."""
    pad_position: int | None = None
    """Row of the position table that padding has (MPNet: 1); None: that of its place, as any token."""

    @property
    def width(self) -> int:
        return int(model_config(self.architecture).hidden_size)

    @property
    def depth(self) -> int:
        return int(model_config(self.architecture).num_hidden_layers)

    def with_depth(self, depth: int) -> TransformersTextConfig:
        config = model_config(self.architecture)
        config.num_hidden_layers = depth
        return replace(self, architecture=architecture_of(config))

    def build(self) -> TransformersText:
        return TransformersText(self)


class TransformersText(TextEncoder):
    def __init__(self, config: TransformersTextConfig):
        super().__init__()
        self.config = config
        own = model_config(config.architecture)
        own.vocab_size = config.vocab
        if getattr(own, "max_position_embeddings", None) is not None:
            own.max_position_embeddings = config.positions + config.position_offset
        self.model = build_model(architecture_of(own))
        self._options = signature(self.model.forward).parameters
        self._masks_checked = False
        for name, parameter in self.model.named_parameters():
            # The pooler's states are not read, so that it gets no gradient: DDP would wait for one.
            if name.startswith("pooler."):
                parameter.requires_grad_(False)

    @property
    def word_table(self) -> Tensor:
        table: Tensor = cast(Any, self.model).get_input_embeddings().weight
        return table

    def embed(self, ids_BL: Tensor, position_BL: Tensor, kind: Tensor | None = None) -> Tensor:
        if kind is None:
            return self._hidden(ids_BL, position_BL)[0]
        if "inputs_embeds" not in self._options:
            raise UserError(f"`model.text` is a {self._name}, which cannot be combined with regions; choose a BERT")
        word_BLD = cast(Any, self.model).get_input_embeddings()(ids_BL) + kind
        return self._hidden(ids_BL, position_BL, word_BLD=word_BLD)[0]

    def public_module(self) -> nn.Module:
        return self.model

    def states(
        self, ids_BL: Tensor, position_BL: Tensor, *, mask: Tensor | None = None, causal: bool = False
    ) -> list[Tensor]:
        L = ids_BL.shape[1]
        if causal:
            mask = torch.ones(1, 1, L, L, dtype=torch.bool, device=ids_BL.device).tril()
        return self._hidden(ids_BL, position_BL, mask=mask)

    def resized(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        own, offset = self.state_dict(), self.config.position_offset
        return {
            name: with_positions(x, len(own[name]), offset) if "position" in name and name in own and x.ndim == 2 else x
            for name, x in state.items()
        }

    @property
    def _name(self) -> str:
        return f"{self.config.architecture.get('model_type')} of transformers"

    def _hidden(
        self, ids_BL: Tensor, position_BL: Tensor, *, mask: Tensor | None = None, word_BLD: Tensor | None = None
    ) -> list[Tensor]:
        """The embedding and the states after each layer. `word_BLD` takes the place of the words' vectors."""
        row_BL = (position_BL + self.config.position_offset).expand_as(ids_BL)
        if self.config.pad_position is not None:
            row_BL = torch.where(ids_BL == self.config.pad, self.config.pad_position, row_BL)
        options: dict[str, Any] = {"input_ids": ids_BL} if word_BLD is None else {"inputs_embeds": word_BLD}
        if "position_ids" in self._options:
            options["position_ids"] = row_BL
        elif not self._in_place(position_BL):
            raise UserError(
                f"`model.text` is a {self._name}, which cannot read tokens at other positions; choose a BERT"
            )
        if mask is not None:
            options["attention_mask"] = self._mask(mask, ids_BL)
        output = self.model(**options, output_hidden_states=True)
        # Where a norm follows the last layer, the last of `hidden_states` is from before it.
        return [*output.hidden_states[:-1], output.last_hidden_state]

    def _in_place(self, position_BL: Tensor) -> bool:
        return bool((position_BL == torch.arange(position_BL.shape[-1], device=position_BL.device)).all())

    def _mask(self, mask: Tensor, ids_BL: Tensor) -> Tensor:
        """Returns a mask in the form that transformers expects: [B L] where all rows see the same tokens, else [B 1 L L]."""
        B, L = ids_BL.shape
        if mask.shape[-2] == 1:
            return mask[:, 0, 0].expand(B, L).long()
        self._check_masks()
        mask = mask.expand(B, 1, L, L)
        if getattr(self.model.config, "_attn_implementation", "eager") == "sdpa":
            return mask
        zero = torch.zeros((), dtype=self.word_table.dtype, device=mask.device)
        return torch.where(mask, zero, torch.finfo(zero.dtype).min)

    @torch.no_grad()
    def _check_masks(self) -> None:
        """Raises UserError if a mask of rows and columns does not keep a token from what it must not see."""
        if self._masks_checked or self.word_table.device.type == "meta":
            return
        self._masks_checked = True
        ids = torch.arange(4, device=self.word_table.device).clamp(max=self.config.vocab - 1)
        ids_24, position = torch.stack([ids, ids.roll(-2)]), torch.arange(4, device=ids.device)
        ids_24[1, :2] = ids_24[0, :2]
        try:
            with evaluation_mode(self):
                first, second = self.states(ids_24, position, causal=True)[-1][:, :2]
            honoured = torch.allclose(first, second, atol=1e-4)
        except (RuntimeError, ValueError):
            honoured = False
        if not honoured:
            self._masks_checked = False
            raise UserError(
                f"`model.text` is a {self._name}, which takes no mask of what each word sees, so that it cannot read left to "
                "right: objectives that write (flm, ar, prefixlm) and clip need another text encoder, such as a BERT"
            )
