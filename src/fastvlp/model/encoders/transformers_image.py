"""Any vision model of the package `transformers`: CLIP, SigLIP, ViT, DINOv2, ConvNeXt, EfficientNet, ResNet and more."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from inspect import signature
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from tyro.conf import Fixed

from fastvlp.errors import UserError
from fastvlp.model.encoders import efficientnet_shapes
from fastvlp.model.encoders.interface import ImageEncoder
from fastvlp.model.encoders.measured import Measured, MeasuredConfig, as_states, keep_statistics, leave_unused, measure
from fastvlp.model.encoders.transformers_models import architecture_of, build_model, model_config

# Families whose config states something of the image size that the weights do not depend on.
AT_SIZE: Mapping[Any, Callable[[Mapping[str, Any], int], dict[str, Any]]] = {
    "efficientnet": efficientnet_shapes.at_size
}


@dataclass(frozen=True, kw_only=True)
class TransformersImageConfig(MeasuredConfig):
    """A vision model of transformers, whose states are its `last_hidden_state`."""

    architecture: Annotated[Mapping[str, Any], Fixed] = field(hash=False)
    """Config of the model, as its config.json has it."""
    fixed_statistics: bool = True
    """Whether batch norms keep the statistics that they come with, in training too."""

    @property
    def sized(self) -> Mapping[str, Any]:
        """The architecture for images of `size` pixels. As it is where it was published for this size."""
        change = AT_SIZE.get(self.architecture.get("model_type"))
        if change is None or self.architecture.get("image_size") == self.size:
            return self.architecture
        return change(self.architecture, self.size)

    @property
    def measured(self) -> Measured:
        return _measured(json.dumps(dict(self.sized), sort_keys=True), self.size)

    def normal_form(self) -> TransformersImageConfig:
        # What a config.json leaves out is stated, and what depends on the image size alone is made equal.
        whole = architecture_of(model_config(self.architecture))
        change = AT_SIZE.get(whole.get("model_type"))
        return replace(self, architecture=change(whole, 0) if change else whole)

    def build(self) -> TransformersImage:
        return TransformersImage(self)


@lru_cache(maxsize=32)
def _measured(architecture: str, size: int) -> Measured:
    given = json.loads(architecture)
    name = f"{given.get('model_type')} at {size} pixels"
    with torch.inference_mode(False), torch.enable_grad(), torch.device("meta"):
        image = torch.empty(1, 3, size, size)
        try:
            model = build_model(given)
            output = _last_state(model, image)
            return measure(model, image, output, _patch(given), name)
        except (RuntimeError, ValueError, TypeError, AttributeError) as error:
            raise UserError(f"{name}: cannot encode images ({str(error).splitlines()[0]})") from error


def _patch(architecture: Mapping[str, Any]) -> int | None:
    patch = architecture.get("patch_size")
    return patch if isinstance(patch, int) else None


def _last_state(model: nn.Module, image: Tensor) -> Any:
    # Positions of another image size are resized; a model without positions has no such option.
    options = (
        {"interpolate_pos_encoding": True} if "interpolate_pos_encoding" in signature(model.forward).parameters else {}
    )
    return model(pixel_values=image, **options).last_hidden_state


class TransformersImage(ImageEncoder):
    def __init__(self, config: TransformersImageConfig):
        super().__init__(config)
        self.config = config
        self.model = build_model(config.sized)
        leave_unused(self.model, config.measured)

    def train(self, mode: bool = True) -> TransformersImage:
        super().train(mode)
        if self.config.fixed_statistics:
            keep_statistics(self.model)
        return self

    def public_module(self) -> nn.Module:
        return self.model

    def forward(self, image: Tensor, keep_BK: Tensor | None = None) -> Tensor:
        return as_states(_last_state(self.model, self.normalised(image)))
