"""BERT and RoBERTa (arXiv 1810.04805, 1907.11692) in the layout of transformers: BERT, Chinese RoBERTa-wwm, MiniLM and e5,
Chinese CLIP's text encoder, RoBERTa, XLM-RoBERTa."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from torch import Tensor

from fastvlp.convert.bert_layers import roberta_encoder, with_type_in_positions
from fastvlp.convert.clip_encoders import projection_width
from fastvlp.convert.encoder_family import TextFamily, TextReading, layer_config
from fastvlp.convert.weight_map import WeightMap, Weights
from fastvlp.model.encoders.text_transformer import TextTransformerConfig
from fastvlp.model.joint_space import HeadConfig

TYPES = "embeddings.token_type_embeddings.weight"
# The hub's first files have the norms' parameters by their names in TensorFlow.
TENSORFLOW = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}


class BERTs(TextFamily):
    model_types: ClassVar[tuple[str, ...]] = ("bert",)
    anchor = "embeddings.word_embeddings.weight"
    layers = "encoder.layer."
    dropout = "hidden_dropout_prob"
    defaults: ClassVar[Mapping[str, Any]] = {
        "vocab_size": 30522,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "max_position_embeddings": 512,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-12,
        "hidden_dropout_prob": 0.1,
        "position_embedding_type": "absolute",
    }

    def config(self, config: Mapping[str, Any]) -> TextTransformerConfig | None:
        given = self.given(config)
        layer = layer_config(given, dropout="hidden_dropout_prob", norm="post")
        if layer is None or given["position_embedding_type"] != "absolute":
            return None
        return TextTransformerConfig(
            positions=given["max_position_embeddings"],
            vocab=given["vocab_size"],
            depth=given["num_hidden_layers"],
            layer=layer,
            embed_eps=layer.eps,
        )

    def reading(self, config: Mapping[str, Any]) -> TextReading:
        # The state of [CLS] was not trained to say what a text is about.
        return TextReading(head=HeadConfig(pool="mean"), mask="full")

    def names(self, depth: int) -> WeightMap:
        sources = {name.removeprefix("text."): parts for name, parts in roberta_encoder("text", "", depth).items()}
        return WeightMap(sources=sources, unused=("embeddings.position_ids",))

    def encoder(self, weights: Weights, depth: int) -> dict[str, Tensor]:
        return super().encoder(with_type_in_positions(self.own_weights(weights), ""), depth)

    def tensors(self, state: Weights, depth: int) -> dict[str, Tensor]:
        # The vector of the first token type is in the positions.
        return {
            **super().tensors(state, depth),
            TYPES: state["word.weight"].new_zeros(2, state["word.weight"].shape[1]),
        }

    def own_weights(self, weights: Weights) -> dict[str, Tensor]:
        renamed = {}
        for name, x in super().own_weights(weights).items():
            for old, new in TENSORFLOW.items():
                name = name.replace(old, new)
            renamed[name] = x
        return renamed

    def types(self, weights: Weights) -> Tensor | None:
        return self.own_weights(weights)[TYPES]


class RoBERTas(BERTs):
    model_types = ("roberta", "xlm-roberta", "camembert")
    defaults: ClassVar[Mapping[str, Any]] = {**BERTs.defaults, "vocab_size": 50265, "pad_token_id": 1}

    def config(self, config: Mapping[str, Any]) -> TextTransformerConfig | None:
        plain = super().config(config)
        if plain is None:
            return None
        # Its table of positions begins with rows that no token has, the last of which is that of padding.
        pad = self.given(config)["pad_token_id"]
        return replace(plain, positions=plain.positions - pad - 1, position_offset=pad + 1, pad_position=pad)

    def stated(self, config: TextTransformerConfig) -> dict[str, Any]:
        plain = super().stated(config)
        return {**plain, "max_position_embeddings": config.positions + config.position_offset, "type_vocab_size": 2}


class ChineseCLIPTexts(BERTs):
    model_types = ("chinese_clip_text_model",)

    def joint(self, config: Mapping[str, Any], whole: Mapping[str, Any]) -> int | None:
        return projection_width(whole)

    def reading(self, config: Mapping[str, Any]) -> TextReading:
        return TextReading(head=HeadConfig(pool="first"), mask="full")

    def projection(self, weights: Weights) -> dict[str, Tensor]:
        matrix = weights.get("text_projection.weight")
        return {} if matrix is None else {"out.weight": matrix}

    def head_tensors(self, state: Weights) -> dict[str, Tensor]:
        return {"text_projection.weight": state["out.weight"]}
