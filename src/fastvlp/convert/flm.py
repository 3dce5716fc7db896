"""FLM (arXiv 2303.14038) as released (TencentARC/FLM bd8b19d), with its MLM and AR baselines."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import isqrt
from typing import Any

import torch
from torch import Tensor

from fastvlp.convert.bert_layers import bert_layer, roberta_encoder, with_type_in_positions
from fastvlp.convert.checkpoint_source import Checkpoint
from fastvlp.convert.clip_image import openai_image_encoder
from fastvlp.convert.interface import Layout, Release, Stated
from fastvlp.convert.published_shapes import head_counts
from fastvlp.convert.weight_map import WeightMap, Weights, apply_map, layer_numbers, weight_and_bias
from fastvlp.model import sizes
from fastvlp.model.encoders.text_transformer import TextTransformerConfig
from fastvlp.model.encoders.vit import ViTConfig
from fastvlp.model.model import ModelConfig
from fastvlp.objectives.ar import ARConfig
from fastvlp.objectives.flm import official_flm
from fastvlp.objectives.mlm import MLMConfig
from fastvlp.objectives.objective import ObjectiveConfig

# The same tensors under second names, and tensors that nothing reads.
UNUSED = (
    "text_transformer2.",
    "text_transformer.pooler.",
    "text_transformer.embeddings.position_ids",
    "cross_modal_layers.",
    "cross_modal_text_layers_r.",
    "cross_modal_text_transform_r.",
    "cross_modal_text_transform_f.",
    "fusion_token_embedding.",
    "lm_type_embeddings.",
    "cross_modal_image_pooler.",
    "vit_model.ln_final.",
    "vit_model.positional_embedding",
    "vit_model.logit_scale",
    "vit_model.text_projection",
    "vit_model.token_embedding.",
    "vit_model.visual.proj",
)
# Heads of tasks and baselines.
HEADS = (
    "cross_modal_text_pooler.",
    "cross_modal_text_pooler_f.",
    "vqa_classifier.",
    "nlvr2_classifier.",
    "rank_output.",
    "itm_score.",
    "itm_score_flm.",
)


# Tensors that all checkpoints of the code have, and prefixes of the heads that fine-tuning adds.
FLM = {"vit_model.visual.conv1.weight", "cross_modal_text_transform.weight"}
TASK_HEADS = ("vqa_classifier.", "nlvr2_classifier.", "rank_output.")
IMAGE_LAYERS, TEXT_LAYERS = "vit_model.visual.transformer.resblocks.", "text_transformer.encoder.layer."


def flm_map(config: ModelConfig, image_depth: int, *, head: str = "lm_score") -> WeightMap:
    """Onto a model of `sizes.flm_base`, whose parts are those of `config` and whose image encoder has `image_depth` layers.
    `head` is `lm_score` (FLM, AR) or `mlm_score` (MLM).

    Released files call the forward stream's head `lm_score_r` and the reverse one's `lm_score_f`.
    """
    sources = openai_image_encoder("image", "vit_model.visual", image_depth)
    sources |= roberta_encoder("text", "text_transformer.", config.text.depth)
    sources |= weight_and_bias("fusion.text_in", "cross_modal_text_transform")
    sources |= weight_and_bias("fusion.image_in", "cross_modal_image_transform")
    for i in range(config.fusion.depth if config.fusion else 0):
        sources |= bert_layer(f"fusion.blocks.{i}", f"cross_modal_text_layers.{i}", attend=True, cross=True)
    sources |= {"fusion.text_type": ("type.text",), "fusion.image_type": ("type.image",)}
    unused = [*UNUSED, *HEADS]
    if config.reconstructor:
        for stage, depth in (("bottom", config.reconstructor.bottom), ("top", config.reconstructor.top)):
            for i in range(depth):
                theirs = f"fusion_layers_{stage}.{i}"
                sources |= bert_layer(f"reconstructor.{stage}.{i}", theirs, attend=False, cross=True)
        sources |= {"reconstructor.reverse_type": ("type.reverse",), "reconstructor.query_type": ("type.query",)}
    else:
        unused += ["fusion_layers_", "type.reverse", "type.query"]
    heads = {"head": head}
    if config.separate_heads:
        heads |= {"forward_head": "lm_score_r", "reverse_head": "lm_score_f"}
    for ours, theirs in heads.items():
        sources |= weight_and_bias(f"{ours}.transform", f"{theirs}.transform.dense")
        sources |= weight_and_bias(f"{ours}.norm", f"{theirs}.transform.LayerNorm")
        sources[f"{ours}.vocabulary.weight"] = (f"{theirs}.decoder.weight",)
        sources[f"{ours}.vocabulary.bias"] = (f"{theirs}.bias",)
    unused += [
        f"{name}." for name in ("lm_score", "lm_score_r", "lm_score_f", "mlm_score") if name not in heads.values()
    ]
    return WeightMap(sources=sources, unused=tuple(unused), flattened=frozenset({"image.patch.weight"}))


def split_types(weights: Weights) -> dict[str, Tensor]:
    """The two tables of types cut into the rows that ours name. Where the file has no row for a second image (NLVR2), it is a
    copy of the first image's."""
    out = {k: v for k, v in weights.items() if not k.startswith("token_type_embeddings")}
    table, own = weights["token_type_embeddings.weight"], weights.get("token_type_embeddings_flm.weight")
    out["type.text"] = table[0]
    out["type.image"] = table[1:] if len(table) > 2 else table[1:2].repeat(2, 1)
    if own is not None:
        out["type.reverse"], out["type.query"] = own[0], own[1]
    return out


def from_flm(weights: Weights, config: ModelConfig, *, head: str = "lm_score") -> dict[str, Tensor]:
    """The model's state dict from a checkpoint of the released code. Raises UserError if a tensor is missing or left
    over."""
    prepared = split_types(with_type_in_positions(weights, "text_transformer."))
    image_depth = len(layer_numbers(weights, IMAGE_LAYERS))
    return apply_map(prepared, flm_map(config, image_depth, head=head), layout="the released FLM code")


def flm_settings(source: Checkpoint) -> Mapping[str, Any]:
    """The hyperparameters that the released code saves with the weights; empty if the file has none."""
    settings = source.contents.other.get("hyper_parameters")
    return settings if isinstance(settings, dict) else {}


def is_captioner(source: Checkpoint) -> bool:
    """Whether the checkpoint writes captions between two tokens that were added for them."""
    return bool(flm_settings(source).get("add_new_bos_token"))


def flm_config(source: Checkpoint, stated: Stated) -> ModelConfig:
    """The model of the tensors."""
    weights, settings = source.weights, flm_settings(source)
    width = weights["cross_modal_text_transform.weight"].shape[0]
    known = settings.get("num_heads") or {768: 12, 1024: 16}.get(width)
    (heads,) = head_counts(stated, {"the text layers": known})
    patch, vit_width = weights["vit_model.visual.conv1.weight"].shape[-1], len(weights["vit_model.visual.ln_post.bias"])
    config = sizes.flm_base(size=isqrt(len(weights["vit_model.visual.positional_embedding"])) * patch)
    image, text, fusion, reconstructor = config.image, config.text, config.fusion, config.reconstructor
    assert isinstance(image, ViTConfig) and isinstance(text, TextTransformerConfig) and fusion and reconstructor
    depths = {name: len(layer_numbers(weights, f"fusion_layers_{name}.")) for name in ("bottom", "top")}
    layers = {"image": f"{IMAGE_LAYERS}0.mlp.c_fc", "text": f"{TEXT_LAYERS}0.intermediate.dense"}
    layers |= {"fusion": "cross_modal_text_layers.0.intermediate.dense"}
    hidden = {name: len(weights[f"{theirs}.bias"]) for name, theirs in layers.items()}
    cross = replace(fusion.layer, width=width, heads=heads, hidden=hidden["fusion"])
    return replace(
        config,
        image=replace(
            image,
            patch=patch,
            depth=len(layer_numbers(weights, IMAGE_LAYERS)),
            # clip_model.py of the released code: heads of 64 numbers.
            layer=replace(image.layer, width=vit_width, heads=vit_width // 64, hidden=hidden["image"]),
        ),
        text=replace(
            text,
            positions=len(weights["text_transformer.embeddings.position_embeddings.weight"]) - text.position_offset,
            depth=len(layer_numbers(weights, TEXT_LAYERS)),
            layer=replace(text.layer, width=width, heads=heads, hidden=hidden["text"]),
        ),
        fusion=replace(fusion, depth=len(layer_numbers(weights, "cross_modal_text_layers.")), layer=cross),
        reconstructor=replace(reconstructor, **depths, layer=cross) if any(depths.values()) else None,
        separate_heads=_separate_heads(weights),
    )


def _separate_heads(weights: Weights) -> bool:
    """Whether FLM's directions have heads of their own, which the file then has beside the shared one."""
    heads = [weights.get(f"{name}.transform.dense.weight") for name in ("lm_score", "lm_score_r", "lm_score_f")]
    shared, *others = heads
    return shared is not None and any(other is not None and not torch.equal(shared, other) for other in others)


class FLMLayout(Layout):
    name = "flm"
    summary = "FLM, or its MLM and AR baselines, as pretrained by its code"
    options = ("heads",)

    @classmethod
    def recognises(cls, source: Checkpoint) -> bool:
        tuned = any(name.startswith(TASK_HEADS) for name in source.names)
        return source.names >= FLM and not tuned and not is_captioner(source)

    def read(self, source: Checkpoint, stated: Stated) -> Release:
        weights, config = source.weights, flm_config(source, stated)
        head = "lm_score" if "lm_score.bias" in weights else "mlm_score"
        baseline: ObjectiveConfig = ARConfig(bos="official") if head == "lm_score" else MLMConfig()
        objectives: dict[str, ObjectiveConfig] = {"ar" if head == "lm_score" else "mlm": baseline}
        if config.reconstructor is not None:
            rate = flm_settings(source).get("span_corruption_rate", 0)
            objectives = {"flm": official_flm("centred", rate) if rate else official_flm()}
        return Release(
            config=config,
            weights=from_flm(weights, config, head=head),
            data={"max_length": flm_settings(source).get("max_text_len", 50), "fit": "crop", "captions": "captions"},
            objectives=objectives,
        )
