"""FLIP (arXiv 2212.00794) as released (facebookresearch/flip 9bf6bf8): flax's layout, paths joined by "/"."""

from __future__ import annotations

from dataclasses import replace
from math import isqrt

from torch import Tensor

from fastvlp.convert.checkpoint_source import Checkpoint
from fastvlp.convert.interface import Layout, Release, Stated
from fastvlp.convert.published_shapes import head_counts
from fastvlp.convert.weight_map import Sources, WeightMap, Weights, apply_map, layer_numbers
from fastvlp.model import sizes
from fastvlp.model.encoders.text_transformer import TextTransformerConfig
from fastvlp.model.encoders.vit import ViTConfig
from fastvlp.model.model import ModelConfig
from fastvlp.objectives.clip import CLIPConfig

IMAGE_LAYERS, TEXT_LAYERS = (f"{part}_encoder/Transformer/encoderblock_" for part in ("img", "txt"))


def from_flax(weights: Weights) -> dict[str, Tensor]:
    """The same tensors in torch's layout: a kernel [in out] becomes [out in], that of a convolution [h w in out] the matrix of
    its flattened patches, and tables and vectors lose their leading axes of one."""

    def converted(name: str, x: Tensor) -> Tensor:
        if name.endswith("/kernel"):
            return x.T if x.ndim == 2 else x.permute(3, 2, 0, 1).flatten(1)
        return x.squeeze()

    return {name: converted(name, x) for name, x in weights.items()}


def _norm(ours: str, theirs: str) -> dict[str, tuple[str, ...]]:
    return {f"{ours}.weight": (f"{theirs}/scale",), f"{ours}.bias": (f"{theirs}/bias",)}


def _linear(ours: str, *theirs: str) -> dict[str, tuple[str, ...]]:
    return {
        f"{ours}.weight": tuple(f"{name}/kernel" for name in theirs),
        f"{ours}.bias": tuple(f"{name}/bias" for name in theirs),
    }


def _layers(ours: str, theirs: str, depth: int) -> Sources:
    sources: dict[str, tuple[str, ...]] = {}
    for i in range(depth):
        block, source = f"{ours}.blocks.{i}", f"{theirs}{i:02d}"
        attend = f"{source}/MultiHeadDotProductAttention_0"
        sources |= _linear(f"{block}.attend.qkv", *(f"{attend}/{part}" for part in ("query", "key", "value")))
        sources |= _linear(f"{block}.attend.out", f"{attend}/out")
        sources |= _norm(f"{block}.attend_norm", f"{source}/LayerNorm_0")
        sources |= _norm(f"{block}.mlp_norm", f"{source}/LayerNorm_1")
        sources |= _linear(f"{block}.mlp_in", f"{source}/MlpBlock_0/Dense_0")
        sources |= _linear(f"{block}.mlp_out", f"{source}/MlpBlock_0/Dense_1")
    return sources


def flip_map(image_depth: int, text_depth: int) -> WeightMap:
    """Onto a model of `sizes.flip_published`. Unused: the fixed positions of the image, and the temperature, which is the
    objective's (`CLIP.log_scale`)."""
    sources = {
        **_linear("image.patch", "img_encoder/embedding"),
        "image.class_token": ("img_encoder/cls",),
        **_layers("image", IMAGE_LAYERS, image_depth),
        **_norm("image.norm", "img_encoder/Transformer/encoder_norm"),
        "embed.image.out.weight": ("img_mlp1/kernel",),
        "text.word.weight": ("txt_encoder/token_embedding/embedding",),
        "text.position.weight": ("txt_encoder/posembed_encoder/pos_embedding",),
        **_layers("text", TEXT_LAYERS, text_depth),
        **_norm("embed.text.norm", "txt_encoder/Transformer/encoder_norm"),
        "embed.text.out.weight": ("txt_mlp1/kernel",),
    }
    return WeightMap(sources=sources, unused=("img_encoder/posembed_encoder/", "logit_scale"))


def from_flip(weights: Weights) -> dict[str, Tensor]:
    """The state dict of a model of `sizes.flip_published` from the parameters of a released checkpoint (the tree under
    `target`). Raises UserError if a tensor is missing or left over."""
    depths = (len(layer_numbers(weights, prefix)) for prefix in (IMAGE_LAYERS, TEXT_LAYERS))
    return apply_map(from_flax(weights), flip_map(*depths), layout="FLIP")


# Table 9 of the paper: B/16, L/16 and H/14.
IMAGE_HEADS = {(768, 12): 12, (1024, 24): 16, (1280, 32): 16}
TEXT_HEADS = {(512, 12): 8, (768, 12): 12, (1024, 24): 16}


def flip_config(weights: Weights, stated: Stated) -> ModelConfig:
    """The model of the tensors."""
    patch, _, _, width = weights["img_encoder/embedding/kernel"].shape
    length, text_width = weights["txt_encoder/posembed_encoder/pos_embedding"].shape[-2:]
    depth, text_depth = (len(layer_numbers(weights, prefix)) for prefix in (IMAGE_LAYERS, TEXT_LAYERS))
    known = {"image": IMAGE_HEADS.get((width, depth)), "text": TEXT_HEADS.get((text_width, text_depth))}
    heads, text_heads = head_counts(stated, known)
    config = sizes.flip_published(
        sizes.Tower(depth, width, heads),
        sizes.Tower(text_depth, text_width, text_heads),
        width=weights["img_mlp1/kernel"].shape[1],
        size=isqrt(weights["img_encoder/posembed_encoder/pos_embedding"].shape[-2]) * patch,
        patch=patch,
        length=length,
    )
    hidden, text_hidden = (
        weights[f"{prefix}00/MlpBlock_0/Dense_0/kernel"].shape[1] for prefix in (IMAGE_LAYERS, TEXT_LAYERS)
    )
    assert isinstance(config.image, ViTConfig) and isinstance(config.text, TextTransformerConfig)
    return replace(
        config,
        image=replace(config.image, layer=replace(config.image.layer, hidden=hidden)),
        text=replace(config.text, layer=replace(config.text.layer, hidden=text_hidden)),
    )


class FLIPLayout(Layout):
    name = "flip"
    summary = "FLIP's parameters in flax's layout, names joined by /, as .safetensors"
    options = ("heads",)

    @classmethod
    def recognises(cls, source: Checkpoint) -> bool:
        return "img_encoder/embedding/kernel" in source.names

    def read(self, source: Checkpoint, stated: Stated) -> Release:
        weights = source.weights
        config = flip_config(weights, stated)
        return Release(
            config=config,
            weights=from_flip(weights),
            data={"max_length": config.longest_text, "fit": "crop", "captions": "captions"},
            objectives={"clip": CLIPConfig(bound="clip")},
            objective_weights={"clip.log_scale": weights["logit_scale"].float().reshape(())},
            # Padding is seen, and <s> and </s> are left out.
            needs=frozenset({"pad"}),
        )
