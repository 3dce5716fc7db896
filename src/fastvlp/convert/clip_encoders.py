"""CLIP's and Chinese CLIP's encoders (arXiv 2103.00020, 2211.01335) in the layout of transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from fastvlp.convert.encoder_family import (
    CLIP_MEAN,
    CLIP_STD,
    ImageFamily,
    TextFamily,
    TextReading,
    layer_config,
    square,
)
from fastvlp.convert.weight_map import Sources, WeightMap, Weights, weight_and_bias
from fastvlp.model.encoders.text_transformer import TextTransformerConfig
from fastvlp.model.encoders.vit import ViTConfig
from fastvlp.model.joint_space import HeadConfig


def transformers_layers(depth: int, *, ours: str = "", theirs: str = "encoder.layers.") -> Sources:
    """The layers of either encoder of CLIP or SigLIP."""
    sources: dict[str, tuple[str, ...]] = {}
    for i in range(depth):
        block, source = f"{ours}blocks.{i}", f"{theirs}{i}"
        sources |= weight_and_bias(f"{block}.attend.qkv", *(f"{source}.self_attn.{p}_proj" for p in "qkv"))
        sources |= weight_and_bias(f"{block}.attend.out", f"{source}.self_attn.out_proj")
        sources |= weight_and_bias(f"{block}.attend_norm", f"{source}.layer_norm1")
        sources |= weight_and_bias(f"{block}.mlp_norm", f"{source}.layer_norm2")
        sources |= weight_and_bias(f"{block}.mlp_in", f"{source}.mlp.fc1")
        sources |= weight_and_bias(f"{block}.mlp_out", f"{source}.mlp.fc2")
    return sources


class CLIPImages(ImageFamily):
    model_types = ("clip_vision_model", "chinese_clip_vision_model")
    anchor = "embeddings.class_embedding"
    mean, std, fit = CLIP_MEAN, CLIP_STD, "crop"
    # The last norm is computed of the first state alone.
    states = "pooler_output"
    defaults: ClassVar[Mapping[str, Any]] = {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_channels": 3,
        "image_size": 224,
        "patch_size": 32,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
        "attention_dropout": 0.0,
    }

    def config(self, config: Mapping[str, Any]) -> ViTConfig | None:
        given = self.given(config)
        layer = layer_config(given, dropout="attention_dropout")
        if layer is None or not square(given):
            return None
        return ViTConfig(
            size=given["image_size"],
            patch=given["patch_size"],
            depth=given["num_hidden_layers"],
            layer=layer,
            embed_norm=True,
            patch_bias=False,
            norm_eps=layer.eps,
        )

    def joint(self, config: Mapping[str, Any], whole: Mapping[str, Any]) -> int | None:
        return projection_width(whole)

    def head(self, config: Mapping[str, Any]) -> HeadConfig:
        return HeadConfig(pool="first")

    def names(self, depth: int) -> WeightMap:
        sources = {
            "patch.weight": ("embeddings.patch_embedding.weight",),
            "position": ("embeddings.position_embedding.weight",),
            "class_token": ("embeddings.class_embedding",),
            # Their spelling.
            **weight_and_bias("embed_norm", "pre_layrnorm"),
            **weight_and_bias("norm", "post_layernorm"),
            **transformers_layers(depth),
        }
        return WeightMap(sources=sources, unused=("embeddings.position_ids",), flattened=frozenset({"patch.weight"}))

    def projection(self, weights: Weights) -> dict[str, Tensor]:
        matrix = weights.get("visual_projection.weight")
        return {} if matrix is None else {"out.weight": matrix}

    def head_tensors(self, state: Weights) -> dict[str, Tensor]:
        return {"visual_projection.weight": state["out.weight"]}


class CLIPTexts(TextFamily):
    model_types = ("clip_text_model",)
    anchor = "embeddings.token_embedding.weight"
    defaults: ClassVar[Mapping[str, Any]] = {
        "vocab_size": 49408,
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_hidden_layers": 12,
        "num_attention_heads": 8,
        "max_position_embeddings": 77,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
        "attention_dropout": 0.0,
    }

    def config(self, config: Mapping[str, Any]) -> TextTransformerConfig | None:
        given = self.given(config)
        layer = layer_config(given, dropout="attention_dropout")
        if layer is None:
            return None
        return TextTransformerConfig(
            positions=given["max_position_embeddings"],
            vocab=given["vocab_size"],
            depth=given["num_hidden_layers"],
            layer=layer,
            embed_norm=False,
            last_norm=True,
        )

    def joint(self, config: Mapping[str, Any], whole: Mapping[str, Any]) -> int | None:
        return projection_width(whole)

    def reading(self, config: Mapping[str, Any]) -> TextReading:
        return TextReading(head=HeadConfig(pool="last"), mask="causal")

    def names(self, depth: int) -> WeightMap:
        return text_map(depth)

    def projection(self, weights: Weights) -> dict[str, Tensor]:
        matrix = weights.get("text_projection.weight")
        return {} if matrix is None else {"out.weight": matrix}

    def head_tensors(self, state: Weights) -> dict[str, Tensor]:
        return {"text_projection.weight": state["out.weight"]}


def projection_width(whole: Mapping[str, Any]) -> int | None:
    """Width of the joint space of a model of two encoders; None for one encoder."""
    return whole.get("projection_dim", 512) if "text_config" in whole else None


def text_map(depth: int) -> WeightMap:
    """The text encoder of CLIP or SigLIP."""
    sources = {
        "word.weight": ("embeddings.token_embedding.weight",),
        "position.weight": ("embeddings.position_embedding.weight",),
        **transformers_layers(depth),
        **weight_and_bias("last_norm", "final_layer_norm"),
    }
    return WeightMap(sources=sources, unused=("embeddings.position_ids",))
