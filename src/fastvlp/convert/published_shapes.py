"""The number of heads and the activation of layers, which tensors do not show. They come from a config, from the user, or
from the size of a published model."""

from __future__ import annotations

from collections.abc import Mapping

from fastvlp.convert.encoder_family import ACTIVATIONS
from fastvlp.convert.interface import Stated
from fastvlp.errors import UserError
from fastvlp.model.layers import Activation

# (width, layers) -> attention heads, where a project has published one model of that shape.
Published = Mapping[tuple[int, int], int]
BERT: Published = {(768, 12): 12, (1024, 24): 16}


def head_counts(stated: Stated, known: Mapping[str, int | None]) -> list[int]:
    """Attention heads of each stack of layers: what is known of it, else what the user states.

    Args:
        known: by the name of each stack; None if no config says and no published model has its shape.

    Raises UserError if neither tells.
    """
    if stated.heads:
        if len(stated.heads) != len(known):
            raise UserError(f"`heads` has {len(stated.heads)} numbers; give one number for each of {', '.join(known)}")
        return [*stated.heads]
    unknown = [name for name, heads in known.items() if heads is None]
    if unknown:
        raise UserError(
            f"the files do not state the number of attention heads of {' and '.join(unknown)}: give `heads`, one number for "
            f"each of {', '.join(known)}, or the `config` of the checkpoint"
        )
    return [heads for heads in known.values() if heads is not None]


def activation_of(name: str | None, stated: Stated) -> Activation:
    """The activation that a config calls `name`, else the one that the user states. Raises UserError if neither tells, or
    where it is another than ours have."""
    if stated.activation is not None:
        return stated.activation
    if name is None:
        raise UserError(
            "the activation of the layers is not known from its files: give `activation`, or the `config` of the checkpoint"
        )
    if name not in ACTIVATIONS:
        raise UserError(f"its activation is {name}; there are {', '.join(sorted(set(ACTIVATIONS.values())))}")
    return ACTIVATIONS[name]
