"""CLIP's image encoder (arXiv 2103.00020) in OpenAI's names."""

from __future__ import annotations

from fastvlp.convert.weight_map import weight_and_bias


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
