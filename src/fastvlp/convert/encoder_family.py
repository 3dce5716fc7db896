"""Families of public encoders, in the layout of transformers, whose weights fit an encoder of ours exactly.

A family reads sizes, activation and epsilon from a model's config.json. What is not stated there has the value that
transformers gives it.
"""

from __future__ import annotations

import abc
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from math import isqrt
from typing import Any, ClassVar

from torch import Tensor

from fastvlp.convert.weight_map import WeightMap, Weights, apply_map, layer_numbers, undo_map
from fastvlp.data.records.transform import Fit
from fastvlp.errors import UserError
from fastvlp.model.encoders.text_transformer import TextTransformerConfig
from fastvlp.model.encoders.vit import ViTConfig
from fastvlp.model.joint_space import HeadConfig, TextMask
from fastvlp.model.layers import Activation, LayerConfig

# Activations by their names in transformers.
ACTIVATIONS: Mapping[str, Activation] = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
}
RGB = tuple[float, float, float]
HALF: RGB = (0.5, 0.5, 0.5)
CLIP_MEAN: RGB = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD: RGB = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True, kw_only=True)
class TextReading:
    """The way in which a public text encoder computes one vector of a text, as fields of `EmbedConfig`."""

    head: HeadConfig
    mask: TextMask
    start: bool = True
    length: int | None = None
    pad: int | None = None


class EncoderFamily(abc.ABC):
    """The common base of families of image and text encoders."""

    model_types: ClassVar[Collection[str]]
    """`model_type` in config.json of such models, or of the part of a larger model."""
    anchor: ClassVar[str]
    """Name of a tensor that all have; what comes before it in a file is the prefix of all names."""
    defaults: ClassVar[Mapping[str, Any]]
    """Values that transformers uses for fields that config.json does not state."""
    ours: ClassVar[type]
    """Class of our encoder."""
    unsaid: ClassVar[tuple[str, ...]]
    """Fields of our encoder that config.json does not state."""
    layers: ClassVar[str] = "encoder.layers."
    """Prefix of the tensors of the layers."""
    dropout: ClassVar[str] = "attention_dropout"
    """Key of the layers' dropout in config.json."""
    states: ClassVar[str] = "last_hidden_state"
    """Output of the model in transformers that has our states."""

    @abc.abstractmethod
    def names(self, depth: int) -> WeightMap:
        """Names of the parameters of an encoder of `depth` layers, ours and theirs."""

    def encoder(self, weights: Weights, depth: int) -> dict[str, Tensor]:
        """Parameters of the encoder with its first `depth` layers, by their names in ours."""
        return self.mapped(weights, self.names(depth), self.layers, depth)

    def tensors(self, state: Weights, depth: int) -> dict[str, Tensor]:
        """The tensors that `encoder` makes `state` of, without a prefix; the other direction of `encoder`."""
        return undo_map(state, self.names(depth))

    def settings(self, config: Any) -> dict[str, Any] | None:
        """The config.json of an encoder of ours in this layout; None if the layout has no such encoder."""
        if not isinstance(config, self.ours):
            return None
        stated = {"model_type": sorted(self.model_types)[0], **self.defaults, **self.stated(config)}
        again = self.config(stated)
        # What a layout does not say of an encoder: pixels are normalised elsewhere, positions are learned by then, and
        # special tokens are the tokenizer's.
        unsaid = {name: getattr(config, name) for name in self.unsaid}
        return stated if again is not None and replace(again, **unsaid) == config else None

    @abc.abstractmethod
    def config(self, config: Mapping[str, Any]) -> Any:
        """The encoder of a config.json; None if it has something that ours lacks."""

    @abc.abstractmethod
    def stated(self, config: Any) -> dict[str, Any]:
        """A config.json of an encoder of ours, as far as it has a place there."""

    def given(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The config of the encoder with the defaults filled in."""
        return {**self.defaults, **{key: value for key, value in config.items() if value is not None}}

    def joint(self, config: Mapping[str, Any], whole: Mapping[str, Any]) -> int | None:
        """Width of the joint space that `projection` leads to, by the config of the encoder and of the model that it is in."""
        return None

    def projection(self, weights: Weights) -> dict[str, Tensor]:
        """Parameters of the head, by their names in ours, where the model has a joint space."""
        return {}

    def head_tensors(self, state: Weights) -> dict[str, Tensor]:
        """The tensors that `projection` makes `state` of, by their names in a model of two encoders."""
        raise UserError(f"{sorted(self.model_types)[0]} has no joint space")

    def own_weights(self, weights: Weights) -> dict[str, Tensor]:
        """The encoder's tensors without their prefix. Raises UserError if there are none."""
        prefixes = {name.removesuffix(self.anchor) for name in weights if name.endswith(self.anchor)}
        if len(prefixes) != 1:
            raise UserError(f"has {len(prefixes)} tensors called {self.anchor}, but one encoder has only one")
        (prefix,) = prefixes
        return {name.removeprefix(prefix): x for name, x in weights.items() if name.startswith(prefix)}

    def mapped(self, weights: Weights, names: WeightMap, layers: str, depth: int) -> dict[str, Tensor]:
        """Our parameters. `layers` is the prefix of the layers, of which those from `depth` on are left out. Raises UserError
        where a tensor is missing or left over."""
        own = self.own_weights(weights)
        further = tuple(f"{layers}{i}." for i in layer_numbers(own, layers) if i >= depth)
        used = {name for parts in names.sources.values() for name in parts}
        # Without a prefix the heads of other tasks, and the projections, are among the encoder's tensors.
        parts = {name.partition(".")[0] for name in used}
        foreign = tuple(name for name in own if name.partition(".")[0] not in parts)
        unused = (*names.unused, *further, *foreign)
        whole = WeightMap(sources=names.sources, unused=unused, flattened=names.flattened)
        return apply_map(own, whole, layout=f"{', '.join(sorted(self.model_types))} of transformers")


class ImageFamily(EncoderFamily):
    """Vision models whose weights fit our vision transformer."""

    ours = ViTConfig
    unsaid = ("mean", "std", "position_start")
    mean: ClassVar[RGB]
    std: ClassVar[RGB]
    fit: ClassVar[Fit]
    """How an image becomes a square, and its mean and std, where the model has no preprocessor_config.json."""

    @abc.abstractmethod
    def config(self, config: Mapping[str, Any]) -> ViTConfig | None:
        """The encoder of a config.json; None if it has something that ours lacks."""

    @abc.abstractmethod
    def head(self, config: Mapping[str, Any]) -> HeadConfig:
        """Returns the head with which transformers computes one vector from an image's states."""

    def stated(self, config: ViTConfig) -> dict[str, Any]:
        return {
            **stated_layer(config.depth, config.layer, dropout=self.dropout),
            "num_channels": 3,
            "image_size": config.size,
            "patch_size": config.patch,
        }

    def tensors(self, state: Weights, depth: int) -> dict[str, Tensor]:
        tensors = super().tensors(state, depth)
        for ours in self.names(depth).flattened:
            (theirs,) = self.names(depth).sources[ours]
            x = tensors[theirs]
            side = isqrt(x.shape[1] // 3)
            tensors[theirs] = x.reshape(-1, 3, side, side)
        return tensors


class TextFamily(EncoderFamily):
    """Text encoders whose weights fit our text transformer."""

    ours = TextTransformerConfig
    unsaid = ("pad", "bos", "eos", "mask")

    @abc.abstractmethod
    def config(self, config: Mapping[str, Any]) -> TextTransformerConfig | None:
        """The encoder of a config.json; None if it has something that ours lacks."""

    @abc.abstractmethod
    def reading(self, config: Mapping[str, Any]) -> TextReading:
        """Returns the way in which transformers computes one vector of a text."""

    def stated(self, config: TextTransformerConfig) -> dict[str, Any]:
        return {
            **stated_layer(config.depth, config.layer, dropout=self.dropout),
            "vocab_size": config.vocab,
            "max_position_embeddings": config.positions,
            "bos_token_id": config.bos,
            "eos_token_id": config.eos,
            "pad_token_id": config.pad,
        }

    def types(self, weights: Weights) -> Tensor | None:
        """Vectors of the token types, of which the positions of `encoder` have the first one added."""
        return None


def layer_config(given: Mapping[str, Any], *, dropout: str, **fields: Any) -> LayerConfig | None:
    """The layers of a config.json; None for an activation that ours lacks. `dropout` names its key."""
    activation = ACTIVATIONS.get(given["hidden_act"])
    if activation is None:
        return None
    return LayerConfig(
        width=given["hidden_size"],
        heads=given["num_attention_heads"],
        hidden=given["intermediate_size"],
        eps=given["layer_norm_eps"],
        activation=activation,
        dropout=given[dropout],
        **fields,
    )


def stated_layer(depth: int, layer: LayerConfig, *, dropout: str) -> dict[str, Any]:
    """Returns the fields of a config.json that describe layers; the inverse of `layer_config`."""
    names = {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "quick_gelu": "quick_gelu", "relu": "relu"}
    return {
        "hidden_size": layer.width,
        "num_attention_heads": layer.heads,
        "intermediate_size": layer.hidden,
        "num_hidden_layers": depth,
        "layer_norm_eps": layer.eps,
        "hidden_act": names[layer.activation],
        dropout: layer.dropout,
    }


def square(given: Mapping[str, Any]) -> bool:
    """Whether images and patches are square and have three colours."""
    return all(isinstance(given[key], int) for key in ("image_size", "patch_size")) and given["num_channels"] == 3
