"""Both towers of CLIP and open_clip checkpoints, with their projections (`visual.*`, `transformer.*`)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from fastvlp.convert.flm import WeightMap, _both, _clip_blocks, _clip_visual, apply_map, vit
from fastvlp.model.model import ModelConfig

PROJECTIONS = ("visual.proj", "text_projection")


def clip_map(config: ModelConfig) -> WeightMap:
    """Onto a model of `sizes.clip`. Unused: the temperature, which is the objective's (`CLIP.log_scale`)."""
    made = {
        **_clip_visual("image", "visual", vit(config).depth),
        "embed.image.out.weight": ("visual.proj",),
        "text.word.weight": ("token_embedding.weight",),
        "text.position.weight": ("positional_embedding",),
        **_clip_blocks("text", "transformer", config.text.depth),
        **_both("embed.text.norm", "ln_final"),
        "embed.text.out.weight": ("text_projection",),
    }
    # Beside them OpenAI's files hold three numbers that say how large the towers are.
    unused = ("logit_scale", "input_resolution", "context_length", "vocab_size")
    return WeightMap(made=made, unused=unused, reshaped=frozenset({"image.patch.weight"}))


def from_openclip(weights: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """A VLModel's state dict. Raises UserError where a tensor is missing or left over."""
    turned = {name: x.T if name in PROJECTIONS else x for name, x in weights.items()}
    return apply_map(turned, clip_map(config), source="CLIP with both towers")
