"""Decides which parts of a model a run trains, and with which share of the learning rate."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

from fastvlp.errors import UserError
from fastvlp.model.model import VLModel


@dataclass(frozen=True, kw_only=True)
class LastLayers:
    """The number of last layers of each encoder that are trained, together with everything after them. Earlier layers and the
    embeddings are frozen."""

    image: int | None = None
    """Number of trained last layers of the image encoder; 0 freezes the whole encoder, None trains it all."""
    text: int | None = None
    """Number of trained last layers of the text encoder; 0 freezes the whole encoder, None trains it all."""


class PartSize(NamedTuple):
    """The number of parameters of a part, and how many of them are trained."""

    parameters: int
    trained: int


def freeze(model: VLModel, parts: Iterable[str], last: LastLayers) -> None:
    """Freezes `parts`, and all layers except the `last` ones. A part is the name of a parameter or of a module. Raises
    UserError if there is no such part, or if an encoder has fewer layers."""
    names = [name for name, _ in model.named_parameters()]
    for part in parts:
        if not any(f"{name}.".startswith(f"{part}.") for name in names):
            own = ", ".join(dict.fromkeys(name.partition(".")[0] for name in names))
            raise UserError(f"`freeze`: the model has no {part}; it has {own}, and in them parts such as text.blocks.0")
    model.freeze([*parts, *_all_but_last(model, "image", last.image), *_all_but_last(model, "text", last.text)])


def _all_but_last(model: VLModel, part: str, count: int | None) -> Iterator[str]:
    if count is None:
        return
    encoder = model.encoders().get(part)
    if encoder is None:
        raise UserError(f"`train_last.{part}`: the model has no {part} encoder")
    if count == 0:
        yield part
        return
    names = encoder.layer_names()
    if not 0 <= count <= len(names.layers):
        raise UserError(
            f"`train_last.{part}` {count}: the {part} encoder has {len(names.layers)} layers; give 0 to {len(names.layers)}"
        )
    yield from (f"{part}.{name}" for name in (*names.before, *names.layers[: len(names.layers) - count]))


def layer_rates(model: VLModel, decay: float) -> dict[int, float]:
    """Returns the share of its encoder's learning rate for each parameter, by its id: `decay` for the last layer, its square
    for the layer before, and so on down to the embeddings (BEiT, arXiv 2106.08254; MAE, 2111.06377). Parameters after the
    layers have the whole rate."""
    rates: dict[int, float] = {}
    for encoder in model.encoders().values():
        before, layers, _ = encoder.layer_names()
        for distance, names in enumerate([*([name] for name in reversed(layers)), before], 1):
            for name in names:
                rates |= {id(parameter): decay**distance for parameter in parameters_in(encoder, name)}
    return rates


def parameters_in(module: nn.Module, name: str) -> Iterator[nn.Parameter]:
    """Returns the parameter `name`, or the parameters of the module of this name."""
    return (parameter for own, parameter in module.named_parameters() if f"{own}.".startswith(f"{name}."))


def part_sizes(model: VLModel, objectives: nn.ModuleDict) -> dict[str, PartSize]:
    """Returns the size of each part of the model, and of each objective with trained parameters, by name. A shared parameter is
    counted in the first part that has it."""
    sizes: dict[str, PartSize] = {}
    counted: set[int] = set()
    trained = [(f"objective {name}", part) for name, part in objectives.named_children() if _trains(part)]
    named = [*model.named_children(), *trained]
    for name, part in named:
        own = [parameter for parameter in part.parameters() if id(parameter) not in counted]
        counted |= {id(parameter) for parameter in own}
        if own:
            learn = sum(parameter.numel() for parameter in own if parameter.requires_grad)
            sizes[name] = PartSize(sum(parameter.numel() for parameter in own), learn)
    return sizes


def _trains(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def sizes_line(sizes: dict[str, PartSize]) -> str:
    """Returns a line on the trained parameters: `trains 1.2 M of 88 M parameters: image 0 of 86 M (frozen), text 1.2 M`."""
    total, trained = (sum(column) for column in zip(*sizes.values()))
    parts = [_part(name, size) for name, size in sizes.items()]
    return f"trains {short_count(trained)} of {short_count(total)} parameters: {', '.join(parts)}"


def _part(name: str, size: PartSize) -> str:
    if size.trained == size.parameters:
        return f"{name} {short_count(size.parameters)}"
    if not size.trained:
        return f"{name} {short_count(size.parameters)} (frozen)"
    return f"{name} {short_count(size.trained)} of {short_count(size.parameters)}"


def short_count(number: int) -> str:
    """Returns a number with three digits and its unit: 85.8 M."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return str(number)
