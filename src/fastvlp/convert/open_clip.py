"""CLIP (arXiv 2103.00020) as OpenAI and open_clip publish it: both encoders with their projections."""

from __future__ import annotations

from math import isqrt

from torch import Tensor

from fastvlp.convert.clip_image import openai_image_encoder, openai_layers
from fastvlp.convert.interface import Layout, Release
from fastvlp.convert.weight_map import WeightMap, Weights, apply_map, layer_numbers, weight_and_bias
from fastvlp.model import sizes
from fastvlp.model.layers import Activation
from fastvlp.objectives.clip import CLIPConfig

# Matrices that are laid out [in out], ours being [out in].
PROJECTIONS = ("visual.proj", "text_projection")
IMAGE_LAYERS, TEXT_LAYERS = "visual.transformer.resblocks.", "transformer.resblocks."


def clip_map(image_depth: int, text_depth: int) -> WeightMap:
    """Onto a model of `sizes.clip`. The temperature is unused: it is the objective's (`CLIP.log_scale`)."""
    sources = {
        **openai_image_encoder("image", "visual", image_depth),
        "embed.image.out.weight": ("visual.proj",),
        "text.word.weight": ("token_embedding.weight",),
        "text.position.weight": ("positional_embedding",),
        **openai_layers("text", "transformer", text_depth),
        **weight_and_bias("embed.text.norm", "ln_final"),
        "embed.text.out.weight": ("text_projection",),
    }
    # Beside the temperature OpenAI's files hold three numbers that say how large the encoders are.
    unused = ("logit_scale", "input_resolution", "context_length", "vocab_size")
    return WeightMap(sources=sources, unused=unused, flattened=frozenset({"image.patch.weight"}))


def from_open_clip(weights: Weights) -> dict[str, Tensor]:
    """The state dict of a model of `sizes.clip`. Raises UserError where a tensor is missing or left over."""
    transposed = {name: x.T if name in PROJECTIONS else x for name, x in weights.items()}
    depths = (len(layer_numbers(weights, prefix)) for prefix in (IMAGE_LAYERS, TEXT_LAYERS))
    return apply_map(transposed, clip_map(*depths), layout="CLIP with both towers")


class OpenCLIPLayout(Layout):
    name = "open_clip"
    activations = ("gelu", "quick_gelu")
    # CLIP's vocabulary has neither padding nor a mask.
    completes_vocabulary = True

    def read(self, weights: Weights, activation: Activation | None = None) -> Release:
        width, _, patch, _ = weights["visual.conv1.weight"].shape
        positions, text_width = weights["positional_embedding"].shape
        openai = "input_resolution" in weights
        config = sizes.clip(
            sizes.Tower.published(len(layer_numbers(weights, IMAGE_LAYERS)), width),
            sizes.Tower.published(len(layer_numbers(weights, TEXT_LAYERS)), text_width),
            width=weights["text_projection"].shape[1],
            size=isqrt(len(weights["visual.positional_embedding"])) * patch,
            patch=patch,
            positions=positions,
            activation=activation or ("quick_gelu" if openai else "gelu"),
        )
        return Release(
            config=config,
            weights=from_open_clip(weights),
            data={"max_length": positions},
            objectives={"clip": CLIPConfig()},
            objective_weights={"clip.log_scale": weights["logit_scale"].float().reshape(())},
        )
