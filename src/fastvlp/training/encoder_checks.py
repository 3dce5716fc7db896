"""Checks at the start of a run that encoders do what their interface says. They may be in a user's own file."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvlp.errors import UserError
from fastvlp.model.encoders.interface import TextEncoder, TextEncoderConfig
from fastvlp.model.freezing import evaluation_mode
from fastvlp.model.layers import select_rows
from fastvlp.model.model import VLModel

# Share of the largest number by which two ways to the same state may differ: more than rounding, TF32's included.
TOLERANCE = 0.02


@torch.no_grad()
def check_encoders(model: VLModel) -> None:
    """Raises UserError if an encoder does not return what its config says, or if a text encoder ignores what a token may attend
    to: it would then see the words that it has to predict."""
    parts = model.encoders()
    if "image" in parts:
        with evaluation_mode(model.image):
            _check_image(model)
    if "text" in parts:
        with evaluation_mode(model.text):
            _check_text(model.text, model.config.text)


def _check_image(model: VLModel) -> None:
    config, device = model.config.image, next(model.parameters()).device
    shape = model.image(torch.zeros(1, 3, config.size, config.size, dtype=torch.uint8, device=device)).shape
    if tuple(shape) != (1, config.tokens, config.width):
        raise UserError(
            f"{type(config).__name__} says that an image has {config.tokens} states of {config.width} numbers (`grid` "
            f"{config.grid}, `prefix` {config.prefix}, `width` {config.width}), and its module returned a tensor of shape "
            f"{list(shape)}; correct the one or the other"
        )


def _check_text(text: TextEncoder, config: TextEncoderConfig) -> None:
    name, L = type(config).__name__, min(4, config.positions, config.vocab)
    position_L = torch.arange(L, device=text.word_table.device)
    ids_1L = position_L[None]
    shapes = [tuple(state.shape) for state in text.states(ids_1L, position_L)]
    if shapes != [(1, L, config.width)] * (config.depth + 1):
        raise UserError(
            f"{name} says `depth` {config.depth} and `width` {config.width}, so that its `states` should return "
            f"{config.depth + 1} tensors of shape [1, {L}, {config.width}] for a text of {L} tokens: the embeddings, and the "
            f"states after each layer. It returned shapes {[list(shape) for shape in shapes]}; correct the one or the other"
        )
    changed_1L = torch.cat([ids_1L[:, :-1], ids_1L[:, :1]], 1)
    try:
        causal_1LD = text.states(ids_1L, position_L, causal=True)[-1]
    except (UserError, NotImplementedError):  # Some encoders read both sides only. Objectives that need one side fail.
        _check_padding(text, name, ids_1L, changed_1L, position_L)
        return
    if not _close(text.states(changed_1L, position_L, causal=True)[-1][:, :-1], causal_1LD[:, :-1]):
        raise UserError(
            f"{name}: with `causal`, what its `states` returns for a token depends on later tokens; let each token attend "
            "only to itself and the tokens before it"
        )
    mask = torch.ones(1, 1, L, L, dtype=torch.bool, device=ids_1L.device).tril()
    if not _close(text.states(ids_1L, position_L, mask=mask)[-1], causal_1LD):
        raise UserError(
            f"{name}: its `states` should return the same for `causal` as for a `mask` that is True where the column is not "
            "after the row, and does not; in a mask, True says that a row attends to a column"
        )
    _check_padding(text, name, ids_1L, changed_1L, position_L)
    _check_step(text, name, torch.cat([ids_1L, ids_1L.flip(1)]), position_L)


def _check_padding(text: TextEncoder, name: str, ids_1L: Tensor, changed_1L: Tensor, position_L: Tensor) -> None:
    # The mask has one row for all tokens. It hides the last one, as if it were padding.
    mask = (position_L < len(position_L) - 1)[None, None, None]
    pairs = [text.states(ids, position_L, mask=mask)[-1][:, :-1] for ids in (ids_1L, changed_1L)]
    if not _close(*pairs):
        raise UserError(
            f"{name}: what its `states` returns depends on a token that the `mask` hides, so that a text would have other "
            "states beside a longer text, for which it is padded. A mask has the shape [B 1 L L], or [B 1 1 L] if all tokens "
            "attend to the same ones. Correct `states`; or, if a public encoder mixes padding into its states, choose another"
        )


def _check_step(text: TextEncoder, name: str, ids_2L: Tensor, position_L: Tensor) -> None:
    swapped, order = position_L.new_tensor([1, 0]), position_L.new_tensor([0, 1])
    past, steps = text.empty_past(text.word_table.new_empty(2)), []
    for i in range(len(position_L)):
        state_21D = text.step(ids_2L[order, i : i + 1], position_L[i].expand(2, 1), past)
        steps.append(state_21D[order])
        try:
            past, order = select_rows(past, swapped), order[swapped]  # as beam search reorders texts
        except IndexError as error:
            raise UserError(f"{name}: its `empty_past` or `step` keeps a tensor without a row for each text") from error
    if not _close(torch.cat(steps, 1), text.states(ids_2L, position_L, causal=True)[-1]):
        raise UserError(
            f"{name}: its `step` returns other states than its `states` with `causal`, for the same tokens. Correct `step`, "
            "which has to extend `past` in place, or `empty_past`, whose tensors must have a row for each text and be in "
            "a pytree, such as a list or dict. Or delete both: those of the base class encode the text again for each token"
        )


def _close(first: Tensor, second: Tensor) -> bool:
    return first.shape == second.shape and torch.allclose(
        first, second, rtol=0, atol=TOLERANCE * float(second.abs().max()) if second.numel() else 0.0
    )
