"""CLIP's image encoder (arXiv 2103.00020), in OpenAI's names and in those of transformers."""

from __future__ import annotations

from torch import Tensor

from fastvlp.convert.weight_map import WeightMap, Weights, apply_map, layer_numbers, weight_and_bias


def openai_image_encoder(ours: str, theirs: str, depth: int) -> dict[str, tuple[str, ...]]:
    """OpenAI's `visual.*`, without its projection."""
    sources = {
        f"{ours}.patch.weight": (f"{theirs}.conv1.weight",),
        f"{ours}.position": (f"{theirs}.positional_embedding",),
        f"{ours}.class_token": (f"{theirs}.class_embedding",),
        **weight_and_bias(f"{ours}.embed_norm", f"{theirs}.ln_pre"),
        **weight_and_bias(f"{ours}.norm", f"{theirs}.ln_post"),
    }
    return sources | openai_layers(ours, f"{theirs}.transformer", depth)


def openai_layers(ours: str, theirs: str, depth: int) -> dict[str, tuple[str, ...]]:
    """Layers of either encoder of OpenAI's CLIP."""
    sources: dict[str, tuple[str, ...]] = {}
    for i in range(depth):
        block, source = f"{ours}.blocks.{i}", f"{theirs}.resblocks.{i}"
        for part in ("weight", "bias"):
            sources[f"{block}.attend.qkv.{part}"] = (f"{source}.attn.in_proj_{part}",)
        sources |= weight_and_bias(f"{block}.attend.out", f"{source}.attn.out_proj")
        sources |= weight_and_bias(f"{block}.attend_norm", f"{source}.ln_1")
        sources |= weight_and_bias(f"{block}.mlp_norm", f"{source}.ln_2")
        sources |= weight_and_bias(f"{block}.mlp_in", f"{source}.mlp.c_fc")
        sources |= weight_and_bias(f"{block}.mlp_out", f"{source}.mlp.c_proj")
    return sources


def transformers_image_encoder(ours: str, theirs: str, depth: int) -> dict[str, tuple[str, ...]]:
    """The same encoder in transformers (`vision_model.*`; `pre_layrnorm` is their spelling)."""
    sources = {
        f"{ours}.patch.weight": (f"{theirs}.embeddings.patch_embedding.weight",),
        f"{ours}.position": (f"{theirs}.embeddings.position_embedding.weight",),
        f"{ours}.class_token": (f"{theirs}.embeddings.class_embedding",),
        **weight_and_bias(f"{ours}.embed_norm", f"{theirs}.pre_layrnorm"),
        **weight_and_bias(f"{ours}.norm", f"{theirs}.post_layernorm"),
    }
    for i in range(depth):
        block, source = f"{ours}.blocks.{i}", f"{theirs}.encoder.layers.{i}"
        sources |= weight_and_bias(f"{block}.attend.qkv", *(f"{source}.self_attn.{p}_proj" for p in "qkv"))
        sources |= weight_and_bias(f"{block}.attend.out", f"{source}.self_attn.out_proj")
        sources |= weight_and_bias(f"{block}.attend_norm", f"{source}.layer_norm1")
        sources |= weight_and_bias(f"{block}.mlp_norm", f"{source}.layer_norm2")
        sources |= weight_and_bias(f"{block}.mlp_in", f"{source}.mlp.fc1")
        sources |= weight_and_bias(f"{block}.mlp_out", f"{source}.mlp.fc2")
    return sources


def from_clip(weights: Weights, depth: int) -> dict[str, Tensor]:
    """`image.*` of a model from CLIP's image encoder, in OpenAI's or transformers' names.

    Layers from `depth` on are left out: FLM keeps 11 of 12 (arXiv 2303.14038; TencentARC/FLM). Raises UserError where a tensor
    is missing or left over.
    """
    if "vision_model.embeddings.class_embedding" in weights:
        layers, sources = "vision_model.encoder.layers.", transformers_image_encoder("image", "vision_model", depth)
    else:
        layers, sources = "visual.transformer.resblocks.", openai_image_encoder("image", "visual", depth)
    unused = (
        *(f"{layers}{i}." for i in layer_numbers(weights, layers) if i >= depth),
        "vision_model.embeddings.position_ids",
        "text_model.",
        "text_projection",
        "visual_projection",
        "visual.proj",
        "logit_scale",
        "transformer.",
        "token_embedding.",
        "positional_embedding",
        "ln_final.",
    )
    names = WeightMap(sources=sources, unused=unused, flattened=frozenset({"image.patch.weight"}))
    return apply_map(weights, names, layout="CLIP")
