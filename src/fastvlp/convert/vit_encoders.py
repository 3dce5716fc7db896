"""ViT and DeiT (arXiv 2010.11929, 2012.12877) in the layout of transformers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from torch import Tensor

from fastvlp.convert.encoder_family import HALF, ImageFamily, layer_config, square
from fastvlp.convert.weight_map import WeightMap, Weights, weight_and_bias
from fastvlp.model.encoders.vit import ViTConfig
from fastvlp.model.joint_space import HeadConfig


class ViTs(ImageFamily):
    model_types = ("vit",)
    layers = "encoder.layer."
    dropout = "hidden_dropout_prob"
    anchor = "embeddings.cls_token"
    mean, std, fit = HALF, HALF, "squash"
    defaults: ClassVar[Mapping[str, Any]] = {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_channels": 3,
        "image_size": 224,
        "patch_size": 16,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-12,
        "hidden_dropout_prob": 0.0,
        "qkv_bias": True,
    }

    def config(self, config: Mapping[str, Any]) -> ViTConfig | None:
        given = self.given(config)
        layer = layer_config(given, dropout="hidden_dropout_prob")
        if layer is None or not square(given) or not given["qkv_bias"]:
            return None
        return ViTConfig(
            size=given["image_size"],
            patch=given["patch_size"],
            depth=given["num_hidden_layers"],
            layer=layer,
            norm_eps=layer.eps,
        )

    def head(self, config: Mapping[str, Any]) -> HeadConfig:
        # The pooler, a matrix and tanh that only a classifier was trained with, is left out.
        return HeadConfig(pool="first")

    def encoder(self, weights: Weights, depth: int) -> dict[str, Tensor]:
        state = super().encoder(weights, depth)
        return state | {"class_token": state["class_token"].flatten(), "position": state["position"][0]}

    def tensors(self, state: Weights, depth: int) -> dict[str, Tensor]:
        leading = {"class_token": state["class_token"][None, None], "position": state["position"][None]}
        return super().tensors({**state, **leading}, depth)

    def names(self, depth: int) -> WeightMap:
        """Names of the encoder's parameters; tables and vectors still have leading axes of one."""
        sources = {
            "class_token": ("embeddings.cls_token",),
            "position": ("embeddings.position_embeddings",),
            **weight_and_bias("patch", "embeddings.patch_embeddings.projection"),
            **weight_and_bias("norm", "layernorm"),
        }
        for i in range(depth):
            block, source = f"blocks.{i}", f"{self.layers}{i}"
            attention = f"{source}.attention.attention"
            sources |= weight_and_bias(f"{block}.attend.qkv", *(f"{attention}.{p}" for p in ("query", "key", "value")))
            sources |= weight_and_bias(f"{block}.attend.out", f"{source}.attention.output.dense")
            sources |= weight_and_bias(f"{block}.attend_norm", f"{source}.layernorm_before")
            sources |= weight_and_bias(f"{block}.mlp_norm", f"{source}.layernorm_after")
            sources |= weight_and_bias(f"{block}.mlp_in", f"{source}.intermediate.dense")
            sources |= weight_and_bias(f"{block}.mlp_out", f"{source}.output.dense")
        return WeightMap(sources=sources, unused=("embeddings.mask_token",), flattened=frozenset({"patch.weight"}))


class DeiTs(ViTs):
    model_types = ("deit",)
    anchor = "embeddings.distillation_token"

    def config(self, config: Mapping[str, Any]) -> ViTConfig | None:
        plain = super().config(config)
        return None if plain is None else replace(plain, more_tokens=1)

    def names(self, depth: int) -> WeightMap:
        plain = super().names(depth)
        return replace(plain, sources={**plain.sources, "more_tokens": ("embeddings.distillation_token",)})

    def encoder(self, weights: Weights, depth: int) -> dict[str, Tensor]:
        state = super().encoder(weights, depth)
        return state | {"more_tokens": state["more_tokens"][0]}

    def tensors(self, state: Weights, depth: int) -> dict[str, Tensor]:
        return super().tensors({**state, "more_tokens": state["more_tokens"][None]}, depth)
