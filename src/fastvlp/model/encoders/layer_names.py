"""The parts of an encoder in the order in which they compute: what freezing and layer-wise rates go by."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import nn

# A sequence that holds less than this share of the parameters, such as the stem of a CNN, is no row of layers.
LEAST_SHARE = 0.002


class LayerNames(NamedTuple):
    """Names of modules, and of parameters that no module below the encoder holds.

    Attributes:
        before: what comes before the layers, such as embeddings.
        layers: one module each, the first layer first; of a CNN, its blocks or stages.
        after: what comes after the layers, such as a last norm.
    """

    before: tuple[str, ...]
    layers: tuple[str, ...]
    after: tuple[str, ...]


def find_layers(encoder: nn.Module) -> LayerNames:
    """The layers are those of the largest list of modules. Without a list they are the largest sequence, or the sequences
    beside each other (stages of a CNN); without a sequence, the modules of the encoder."""
    lists = _with_weights(encoder, nn.ModuleList)
    if lists:
        return layers_in(encoder, max(lists, key=lists.__getitem__))
    sequences = _with_weights(encoder, nn.Sequential)
    if sequences:
        largest = max(sequences, key=sequences.__getitem__)
        folder = largest.rpartition(".")[0]
        least = LEAST_SHARE * _size(encoder)
        beside = [n for n, size in sequences.items() if n.rpartition(".")[0] == folder and size >= least]
        return layers_in(encoder, largest) if len(beside) < 2 else _around(encoder, beside)
    name, parts = "", _children(encoder, "")
    while len(parts) == 1:
        name = parts[0]
        parts = _children(encoder.get_submodule(name), name)
    return _around(encoder, parts or [name])


def layers_in(encoder: nn.Module, name: str) -> LayerNames:
    """The layers are the modules of the list or sequence `name`."""
    return _around(encoder, [f"{name}.{i}" for i, _ in enumerate(encoder.get_submodule(name).children())], name)


def _around(encoder: nn.Module, layers: list[str], inside: str = "") -> LayerNames:
    before: list[str] = []
    after: list[str] = []
    passed = False
    for name in _outer_names(encoder, {*layers, inside} - {""}):
        passed |= name in layers or name == inside
        if name not in layers and name != inside:
            (after if passed else before).append(name)
    return LayerNames(tuple(before), tuple(layers), tuple(after))


def _outer_names(module: nn.Module, layers: set[str], folder: str = "") -> Iterator[str]:
    """Names of parameters and modules in the order of the code, as far down as it takes to tell the layers from the rest."""
    yield from (folder + name for name, _ in module.named_parameters(recurse=False))
    for child, part in module.named_children():
        name = folder + child
        if any(layer.startswith(f"{name}.") for layer in layers) and name not in layers:
            yield from _outer_names(part, layers, f"{name}.")
        else:
            yield name


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _with_weights(encoder: nn.Module, kind: type[nn.Module]) -> dict[str, int]:
    """The parameters in each module of this kind that has some, by its name."""
    sizes = {name: _size(part) for name, part in encoder.named_modules() if name and isinstance(part, kind)}
    return {name: size for name, size in sizes.items() if size}


def _children(module: nn.Module, name: str) -> list[str]:
    folder = f"{name}." if name else ""
    return [folder + child for child, part in module.named_children() if _size(part)]
