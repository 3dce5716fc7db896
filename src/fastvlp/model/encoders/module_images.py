"""Any image model as an encoder, such as one of timm: an nn.Module that a function in a file of the user's makes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn

from fastvlp.errors import UserError
from fastvlp.extensions import user_function
from fastvlp.model.encoders.interface import ImageEncoder
from fastvlp.model.encoders.measured import Measured, MeasuredConfig, as_states, keep_statistics, leave_unused, measure

RGB = tuple[float, float, float]
# Functions that were given to `from_module`, by the name under which they are saved.
_given: dict[str, Callable[[bool], nn.Module]] = {}


def from_module(
    function: Callable[[bool], nn.Module],
    *,
    size: int,
    mean: RGB = (0.485, 0.456, 0.406),
    std: RGB = (0.229, 0.224, 0.225),
    patch: int | None = None,
    fixed_statistics: bool = False,
) -> ModuleImagesConfig:
    """An encoder for a recipe, from a function in the recipe's file or in one beside it.

    Args:
        function: `function(pretrained: bool)` returns a module that maps normalised images, float [B 3 size size], to tokens
            [B N D] or to a map [B C H W]. Its weights are read from `function(True)` once, when a run starts; a saved model is
            built by `function(False)`, and the file must be imported where it is loaded (`vlp --import FILE.py`).
        size: Side of the square image, in pixels.
        mean: What is subtracted from pixels scaled to 0..1, by channel; ImageNet's by default.
        std: What they are then divided by.
        patch: Side of a patch in pixels, where the module gives tokens and some before those of the patches.
        fixed_statistics: Whether batch norms keep their statistics in training.

    Raises:
        UserError: The function is not one of a file that can be imported again.
    """
    file = inspect.getsourcefile(function)
    if not inspect.isfunction(function) or "<" in function.__qualname__ or file is None:
        raise UserError(
            "`function` must be a function at the top level of a file, so that a saved model can be built again"
        )
    name = f"{Path(file).stem}:{function.__qualname__}"
    _given[name] = function
    return ModuleImagesConfig(
        size=size, mean=mean, std=std, function=name, patch=patch, fixed_statistics=fixed_statistics
    )


@dataclass(frozen=True, kw_only=True)
class ModuleImagesConfig(MeasuredConfig):
    """A module that a function of the user's makes (`from_module`)."""

    function: str
    """The function that makes it, as `FILE:FUNCTION`."""
    patch: int | None = None
    """Side of a patch in pixels, where tokens come before those of the patches."""
    fixed_statistics: bool = False
    """Whether batch norms keep their statistics in training."""

    @property
    def measured(self) -> Measured:
        return _measured(self.function, self.size, self.patch)

    def make(self, pretrained: bool) -> nn.Module:
        """Calls the function and returns its module. Raises UserError if the function is not known, or does not return a
        module."""
        module = (_given.get(self.function) or user_function(self.function))(pretrained)
        if not isinstance(module, nn.Module):
            raise UserError(f"{self.function}: returned a {type(module).__name__}, not an nn.Module")
        return module

    def build(self) -> ModuleImages:
        return ModuleImages(self)

    def starting_weights(self) -> Mapping[str, Tensor]:
        return {f"module.{name}": x for name, x in self.make(True).state_dict().items()}


@lru_cache(maxsize=32)
def _measured(function: str, size: int, patch: int | None) -> Measured:
    name = f"{function} at {size} pixels"
    config = ModuleImagesConfig(size=size, function=function, patch=patch)
    try:
        return _run("meta", config, name)
    except (RuntimeError, NotImplementedError, ValueError, TypeError):
        pass  # not every module runs there
    try:
        return _run("cpu", config, name)
    except (RuntimeError, ValueError, TypeError) as error:
        raise UserError(f"{name}: cannot encode images ({str(error).partition(chr(10))[0]})") from error


def _run(device: str, config: ModuleImagesConfig, name: str) -> Measured:
    with torch.inference_mode(False), torch.enable_grad(), torch.device(device), torch.random.fork_rng(devices=[]):
        module, image = config.make(False).eval(), torch.zeros(1, 3, config.size, config.size)
        return measure(module, image, module(image), config.patch, name)


class ModuleImages(ImageEncoder):
    def __init__(self, config: ModuleImagesConfig):
        super().__init__(config)
        self.config = config
        self.module = config.make(False)
        leave_unused(self.module, config.measured)

    def train(self, mode: bool = True) -> ModuleImages:
        super().train(mode)
        if self.config.fixed_statistics:
            keep_statistics(self.module)
        return self

    def forward(self, image: Tensor, keep_BK: Tensor | None = None) -> Tensor:
        return as_states(self.module(self.normalised(image)))
