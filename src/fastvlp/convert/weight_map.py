"""Maps from the parameter names of public checkpoints to ours: explicit, with nothing left over."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastvlp.errors import UserError

Weights = Mapping[str, Tensor]
# Our parameter -> the source tensors that make it.
Sources = Mapping[str, tuple[str, ...]]


@dataclass(frozen=True, kw_only=True)
class WeightMap:
    """A map from source tensors to our parameters, with the source tensors that are not used."""

    sources: Sources
    """Several tensors are concatenated along the first axis: query, key and value are one matrix here."""
    unused: tuple[str, ...] = ()
    """Prefixes of source tensors that are left out on purpose."""
    flattened: frozenset[str] = field(default_factory=frozenset)
    """Our parameters that are matrices where the source is a convolution."""


def apply_map(weights: Weights, names: WeightMap, *, layout: str) -> dict[str, Tensor]:
    """Our parameters, made of a checkpoint's tensors.

    Raises UserError, with `layout` in its message, where a tensor is missing or left over.
    """
    used = {name for parts in names.sources.values() for name in parts}
    missing = sorted(used - set(weights))
    left = sorted(k for k in weights if k not in used and not k.startswith(names.unused or ("\0",)))
    if missing or left:
        raise UserError(
            f"these weights are not laid out as {layout}: missing {missing[:5]}, left over {left[:5]} "
            f"({len(missing)} and {len(left)} in all); check the checkpoint's origin and the model size"
        )
    made = {
        ours: torch.cat([weights[p] for p in parts]) if len(parts) > 1 else weights[parts[0]]
        for ours, parts in names.sources.items()
    }
    return {ours: x.flatten(1) if ours in names.flattened else x for ours, x in made.items()}


def undo_map(state: Weights, names: WeightMap) -> dict[str, Tensor]:
    """The source tensors that make our parameters; `flattened` ones stay matrices.

    Raises UserError if a parameter is missing or left over.
    """
    if missing := sorted(names.sources.keys() ^ state.keys()):
        raise UserError(f"these parameters have no place in the layout: {missing[:5]} ({len(missing)} in all)")
    tensors: dict[str, Tensor] = {}
    for ours, theirs in names.sources.items():
        tensors |= zip(theirs, state[ours].chunk(len(theirs)))
    return tensors


def weight_and_bias(ours: str, *theirs: str) -> dict[str, tuple[str, ...]]:
    """Both parameters of a linear map or a norm."""
    return {f"{ours}.{part}": tuple(f"{name}.{part}" for name in theirs) for part in ("weight", "bias")}


def layer_numbers(names: Iterable[str], prefix: str) -> set[int]:
    """Numbers that follow `prefix` in any of the names: those of a checkpoint's layers."""
    matches = (re.match(rf"{re.escape(prefix)}(\d+)", name) for name in names)
    return {int(match[1]) for match in matches if match}
