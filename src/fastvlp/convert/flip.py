"""Weights of the released FLIP (facebookresearch/flip 9bf6bf8): flax's layout, paths joined by "/"."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from fastvlp.convert.flm import WeightMap, apply_map, vit
from fastvlp.model.model import ModelConfig


def from_flax(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors laid out as torch's: kernels [in out] become [out in], a convolution's [h w in out] the matrix of
    its flattened patches, tables and vectors lose their leading axes of one."""

    def laid_out(name: str, x: Tensor) -> Tensor:
        if name.endswith("/kernel"):
            return x.T if x.ndim == 2 else x.permute(3, 2, 0, 1).flatten(1)
        return x.squeeze()

    return {name: laid_out(name, x) for name, x in weights.items()}


def _norm(ours: str, theirs: str) -> dict[str, tuple[str, ...]]:
    return {f"{ours}.weight": (f"{theirs}/scale",), f"{ours}.bias": (f"{theirs}/bias",)}


def _linear(ours: str, *theirs: str) -> dict[str, tuple[str, ...]]:
    return {
        f"{ours}.weight": tuple(f"{name}/kernel" for name in theirs),
        f"{ours}.bias": tuple(f"{name}/bias" for name in theirs),
    }


def _blocks(ours: str, theirs: str, depth: int) -> dict[str, tuple[str, ...]]:
    made: dict[str, tuple[str, ...]] = {}
    for i in range(depth):
        block, source = f"{ours}.blocks.{i}", f"{theirs}/Transformer/encoderblock_{i:02d}"
        attend = f"{source}/MultiHeadDotProductAttention_0"
        made |= _linear(f"{block}.attend.qkv", *(f"{attend}/{part}" for part in ("query", "key", "value")))
        made |= _linear(f"{block}.attend.out", f"{attend}/out")
        made |= _norm(f"{block}.attend_norm", f"{source}/LayerNorm_0")
        made |= _norm(f"{block}.mlp_norm", f"{source}/LayerNorm_1")
        made |= _linear(f"{block}.mlp_in", f"{source}/MlpBlock_0/Dense_0")
        made |= _linear(f"{block}.mlp_out", f"{source}/MlpBlock_0/Dense_1")
    return made


def flip_map(config: ModelConfig) -> WeightMap:
    """Onto a model of `sizes.flip`. Unused: the fixed positions of the image, and the temperature, which is the
    objective's (`CLIP.log_scale`)."""
    made = {
        **_linear("image.patch", "img_encoder/embedding"),
        "image.class_token": ("img_encoder/cls",),
        **_blocks("image", "img_encoder", vit(config).depth),
        **_norm("image.norm", "img_encoder/Transformer/encoder_norm"),
        "embed.image.out.weight": ("img_mlp1/kernel",),
        "text.word.weight": ("txt_encoder/token_embedding/embedding",),
        "text.position.weight": ("txt_encoder/posembed_encoder/pos_embedding",),
        **_blocks("text", "txt_encoder", config.text.depth),
        **_norm("embed.text.norm", "txt_encoder/Transformer/encoder_norm"),
        "embed.text.out.weight": ("txt_mlp1/kernel",),
    }
    return WeightMap(made=made, unused=("img_encoder/posembed_encoder/", "logit_scale"))


def from_flip(weights: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """A VLModel's state dict from the parameters of a released checkpoint (the tree under `target`). Raises UserError
    where a tensor is missing or left over."""
    return apply_map(from_flax(weights), flip_map(config), source="FLIP")
