"""SigLIP's encoders (arXiv 2303.15343) in the layout of transformers, SigLIP 2's of fixed size too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastvlp.convert.clip_encoders import text_map, transformers_layers
from fastvlp.convert.encoder_family import HALF, ImageFamily, TextFamily, TextReading, layer_config, square
from fastvlp.convert.weight_map import WeightMap, Weights, weight_and_bias
from fastvlp.model.encoders.text_transformer import TextTransformerConfig
from fastvlp.model.encoders.vit import ViTConfig
from fastvlp.model.joint_space import HeadConfig


class SigLIPImages(ImageFamily):
    model_types = ("siglip_vision_model",)
    anchor = "embeddings.patch_embedding.weight"
    mean, std, fit = HALF, HALF, "squash"
    defaults: ClassVar[Mapping[str, Any]] = {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_channels": 3,
        "image_size": 224,
        "patch_size": 16,
        "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": 1e-6,
        "attention_dropout": 0.0,
        "vision_use_head": True,
    }

    def config(self, config: Mapping[str, Any]) -> ViTConfig | None:
        given = self.given(config)
        layer = layer_config(given, dropout="attention_dropout")
        if layer is None or not square(given) or given["image_size"] % given["patch_size"]:
            return None
        return ViTConfig(
            size=given["image_size"],
            patch=given["patch_size"],
            depth=given["num_hidden_layers"],
            layer=layer,
            class_token=False,
            norm_eps=layer.eps,
        )

    def joint(self, config: Mapping[str, Any], whole: Mapping[str, Any]) -> int | None:
        given = self.given(config)
        return given["hidden_size"] if given["vision_use_head"] else None

    def head(self, config: Mapping[str, Any]) -> HeadConfig:
        given = self.given(config)
        if not given["vision_use_head"]:
            return HeadConfig(pool="mean")
        # What the query reads is the vector itself.
        return HeadConfig(pool="attention", layer=layer_config(given, dropout="attention_dropout"), project=False)

    def names(self, depth: int) -> WeightMap:
        sources = {
            **weight_and_bias("patch", "embeddings.patch_embedding"),
            "position": ("embeddings.position_embedding.weight",),
            **transformers_layers(depth),
            **weight_and_bias("norm", "post_layernorm"),
        }
        return WeightMap(sources=sources, unused=("embeddings.position_ids",), flattened=frozenset({"patch.weight"}))

    def projection(self, weights: Weights) -> dict[str, Tensor]:
        head = {
            name.removeprefix("head."): x for name, x in self.own_weights(weights).items() if name.startswith("head.")
        }
        if "probe" not in head:
            return {}
        width = head["probe"].shape[-1]
        state = {
            "attention.query": head["probe"].flatten(),
            "attention.cross.out.weight": head["attention.out_proj.weight"],
            "attention.cross.out.bias": head["attention.out_proj.bias"],
        }
        for part in ("weight", "bias"):
            own = head[f"attention.in_proj_{part}"]
            state |= {f"attention.cross.query.{part}": own[:width], f"attention.cross.kv.{part}": own[width:]}
            state |= {
                f"attention.norm.{part}": head[f"layernorm.{part}"],
                f"attention.mlp_in.{part}": head[f"mlp.fc1.{part}"],
                f"attention.mlp_out.{part}": head[f"mlp.fc2.{part}"],
            }
        return state

    def head_tensors(self, state: Weights) -> dict[str, Tensor]:
        head = {
            "probe": state["attention.query"][None, None],
            "attention.out_proj.weight": state["attention.cross.out.weight"],
            "attention.out_proj.bias": state["attention.cross.out.bias"],
        }
        for part in ("weight", "bias"):
            own = state[f"attention.cross.query.{part}"], state[f"attention.cross.kv.{part}"]
            head |= {
                f"attention.in_proj_{part}": torch.cat(own),
                f"layernorm.{part}": state[f"attention.norm.{part}"],
                f"mlp.fc1.{part}": state[f"attention.mlp_in.{part}"],
                f"mlp.fc2.{part}": state[f"attention.mlp_out.{part}"],
            }
        return {f"vision_model.head.{name}": x for name, x in head.items()}


class SigLIPTexts(TextFamily):
    model_types = ("siglip_text_model",)
    anchor = "embeddings.token_embedding.weight"
    defaults: ClassVar[Mapping[str, Any]] = {
        "vocab_size": 32000,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "max_position_embeddings": 64,
        "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": 1e-6,
        "attention_dropout": 0.0,
        "pad_token_id": 1,
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
            learn_pad=True,
            last_norm=True,
        )

    def joint(self, config: Mapping[str, Any], whole: Mapping[str, Any]) -> int | None:
        given = self.given(config)
        return given.get("projection_size", given["hidden_size"])

    def reading(self, config: Mapping[str, Any]) -> TextReading:
        given = self.given(config)
        # Padding is seen, and the state at the end of it is the text's.
        return TextReading(
            head=HeadConfig(pool="end", bias=True),
            mask="none",
            start=False,
            length=given["max_position_embeddings"],
            pad=given["pad_token_id"],
        )

    def names(self, depth: int) -> WeightMap:
        return text_map(depth)

    def projection(self, weights: Weights) -> dict[str, Tensor]:
        own = self.own_weights(weights)
        return {f"out.{part}": own[f"head.{part}"] for part in ("weight", "bias") if f"head.{part}" in own}

    def head_tensors(self, state: Weights) -> dict[str, Tensor]:
        return {f"text_model.head.{part}": state[f"out.{part}"] for part in ("weight", "bias")}
