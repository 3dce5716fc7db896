"""Both encoders of a joint space as ONNX graphs, and the vectors that onnxruntime computes with them."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastvlp.errors import UserError, install
from fastvlp.model.model import VLModel

# torch warns here that torchvision's operators are not known; no graph of ours has any.
REGISTRATION = logging.getLogger("torch.onnx._internal.exporter._registration")
# A file of protobuf ends at 2 GB; larger models keep their weights beside the graph.
INLINE_BYTES = 1_900_000_000


class ImageGraph(nn.Module):
    """Normalised pixels, float [B 3 S S], to unit vectors [B E]."""

    def __init__(self, model: VLModel):
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> Tensor:
        return self.model.embed_image(self.model.encode_image(pixels))


class TextGraph(nn.Module):
    """Ids [B L], as the exported tokenizer makes them, and their mask [B L], 1 for tokens and 0 for padding, to unit vectors
    [B E]."""

    def __init__(self, model: VLModel):
        super().__init__()
        self.model = model
        embed = model.config.embed
        # A tokenizer without <s> writes ids as they are read; our encoder drops the first one.
        self.adds_start = embed is not None and embed.text_special and not embed.text_start

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        ids, length = ids.long(), mask.long().sum(1)
        if self.adds_start:
            start = torch.full_like(ids[:, :1], self.model.config.text.bos)
            ids, length = torch.cat([start, ids], 1), length + 1
        return self.model.embed_text(ids, length)


class PaddedTextGraph(TextGraph):
    """Ids alone, int32 [B L]; padding is known by its id."""

    def __init__(self, model: VLModel):
        super().__init__(model)
        embed = model.config.embed
        self.pad = model.config.text.pad if embed is None or embed.text_pad is None else embed.text_pad

    def forward(self, ids: Tensor) -> Tensor:  # type: ignore[override]
        real = ids != self.pad
        if self.pad == self.model.config.text.eos:
            # Of the ids that may be padding the first one is </s>.
            real = torch.cat([torch.ones_like(real[:, :1]), real[:, :-1]], 1)
        return super().forward(ids, real)


def write_graph(
    graph: nn.Module, path: Path, inputs: Mapping[str, Tensor], output: str, axes: Mapping[str, Sequence[str]]
) -> None:
    """Writes a module as ONNX.

    Args:
        graph: The module, whose arguments are `inputs` in their order.
        path: File to write; weights of more than 2 GB are in a file beside it.
        inputs: An example of each input, by the name that it gets.
        output: Name of the output.
        axes: Names of the axes whose length may vary, by input; they are the first ones.

    Raises:
        UserError: The extra `onnx` is not installed.
    """
    package("onnxscript")
    # `auto` and not named dimensions: a name that two inputs share would be a warning for users.
    shapes = tuple(dict.fromkeys(range(len(axes[name])), torch.export.Dim.DYNAMIC) for name in inputs)
    named = {name: dict(enumerate(axes[name])) for name in inputs}
    size = sum(x.numel() * x.element_size() for x in graph.parameters())
    REGISTRATION.addFilter(_not_of_torchvision)
    try:
        with warnings.catch_warnings(), torch.inference_mode(False), torch.no_grad():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                graph.eval(),
                tuple(inputs.values()),
                path,
                dynamo=True,
                dynamic_shapes=shapes,
                input_names=list(inputs),
                output_names=[output],
                external_data=size > INLINE_BYTES,
                verbose=False,
            )
    finally:
        REGISTRATION.removeFilter(_not_of_torchvision)
    _name_axes(path, named | {output: {0: "batch"}})


def _not_of_torchvision(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("torchvision is not installed")


def _name_axes(path: Path, names: Mapping[str, Mapping[int, str]]) -> None:
    """Gives the axes that vary the same names in all graphs."""
    onnx = package("onnx")
    model = onnx.load(path, load_external_data=False)
    for value in [*model.graph.input, *model.graph.output]:
        for i, dimension in enumerate(value.type.tensor_type.shape.dim):
            if i in names.get(value.name, {}):
                dimension.dim_param = names[value.name][i]
    onnx.save(model, path)


def run_graph(path: Path, *batches: Mapping[str, Any]) -> Tensor:
    """Returns the first output of each batch of inputs, in one tensor, that onnxruntime computes on the CPU. Raises UserError
    where it is not installed."""
    session = package("onnxruntime").InferenceSession(path, providers=["CPUExecutionProvider"])
    inputs = [{name: np.ascontiguousarray(x) for name, x in batch.items()} for batch in batches]
    return torch.cat([torch.from_numpy(session.run(None, batch)[0]) for batch in inputs])


def package(name: str) -> ModuleType:
    """Imports a package of the extra `onnx`. Raises UserError if it is not installed."""
    try:
        return __import__(name)
    except ImportError as error:
        raise UserError(f"ONNX graphs are written and checked by {name}: {install('onnx')}") from error
