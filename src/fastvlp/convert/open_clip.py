"""CLIP (arXiv 2103.00020) as OpenAI and open_clip publish it: both encoders with their projections."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from math import isqrt
from typing import Any

from torch import Tensor

from fastvlp.convert.checkpoint_source import Checkpoint
from fastvlp.convert.clip_image import openai_image_encoder, openai_layers
from fastvlp.convert.encoder_family import CLIP_MEAN, CLIP_STD, RGB
from fastvlp.convert.interface import Layout, Release, Stated
from fastvlp.convert.published_shapes import activation_of, head_counts
from fastvlp.convert.weight_map import WeightMap, Weights, apply_map, layer_numbers, weight_and_bias
from fastvlp.data.records.transform import Fit
from fastvlp.errors import UserError
from fastvlp.model import sizes
from fastvlp.model.encoders.text_transformer import TextTransformerConfig
from fastvlp.model.encoders.vit import ViTConfig
from fastvlp.model.joint_space import Pool, TextMask
from fastvlp.model.layers import Activation
from fastvlp.model.model import ModelConfig
from fastvlp.objectives.clip import CLIPConfig
from fastvlp.objectives.objective import ObjectiveConfig
from fastvlp.objectives.siglip import SigLIPConfig

# Matrices that are laid out [in out], ours being [out in].
PROJECTIONS = ("visual.proj", "text_projection")
# A tensor that all have, and one that OpenAI's files alone have.
ANCHOR, SIZE = "visual.conv1.weight", "input_resolution"
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
    unused = ("logit_scale", "logit_bias", SIZE, "context_length", "vocab_size", "attn_mask")
    return WeightMap(sources=sources, unused=unused, flattened=frozenset({"image.patch.weight"}))


def from_open_clip(weights: Weights) -> dict[str, Tensor]:
    """The state dict of a model of `sizes.clip`. Raises UserError if a tensor is missing or left over."""
    transposed = {name: x.T if name in PROJECTIONS else x for name, x in weights.items()}
    depths = (len(layer_numbers(weights, prefix)) for prefix in (IMAGE_LAYERS, TEXT_LAYERS))
    return apply_map(transposed, clip_map(*depths), layout="CLIP with both towers")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings of an open_clip model that its tensors do not show. The defaults are those of open_clip's configs."""

    activation: Activation
    heads: int
    text_heads: int
    eps: float = 1e-5
    text_eps: float = 1e-5
    image_pool: Pool = "first"
    text_pool: Pool = "last"
    text_mask: TextMask = "causal"
    mean: RGB = CLIP_MEAN
    std: RGB = CLIP_STD
    fit: Fit = "crop"
    # Whether a text is summarised at its largest id, which is then that of </s>.
    largest: bool = True


def read_settings(source: Checkpoint, stated: Stated) -> Settings:
    """The settings in open_clip's config of the model, else those that the user states. Raises UserError if neither tells,
    and where the config describes what no model of ours computes."""
    if source.open_clip is None:
        heads, text_heads = head_counts(stated, {"image": None, "text": None})
        return Settings(activation=activation_of(None, stated), heads=heads, text_heads=text_heads)
    config = source.open_clip.get("model_cfg") or {}
    vision, text = config["vision_cfg"], config["text_cfg"]
    for part, (read, neutral) in {"": WHOLE, "vision_cfg": VISION, "text_cfg": TEXT}.items():
        refuse_others(config[part] if part else config, part, read, neutral)
    if isinstance(vision.get("layers"), list):
        raise UserError("its image encoder is a ResNet, which is not supported; choose a model with a ViT")
    activations = [
        "quick_gelu" if config.get("quick_gelu") else _gelu(part.get("act_kwargs") or {}) for part in (vision, text)
    ]
    if activations[0] != activations[1]:
        raise UserError(
            f"its encoders have different activations ({', '.join(activations)}), but all layers must have the same"
        )
    pools = {"argmax": "last", "eos": "last", "last": "end", "first": "first"}
    image_pools = {"tok": "first", "avg": "patches"}
    preprocessing = source.open_clip.get("preprocess_cfg") or {}
    fits = {"shortest": "crop", "longest": "letterbox", "squash": "squash"}
    return Settings(
        activation=activation_of(activations[0], stated),
        heads=vision.get("width", 768) // vision.get("head_width", 64),
        text_heads=text.get("heads", 8),
        eps=(vision.get("norm_kwargs") or {}).get("eps", 1e-5),
        text_eps=(text.get("norm_kwargs") or {}).get("eps", 1e-5),
        image_pool=_one(image_pools, vision.get("pool_type", "tok"), "vision_cfg.pool_type"),
        text_pool=_one(pools, text.get("pool_type", "argmax"), "text_cfg.pool_type"),
        text_mask="none" if text.get("no_causal_mask") else "causal",
        mean=_rgb(preprocessing.get("mean"), CLIP_MEAN),
        std=_rgb(preprocessing.get("std"), CLIP_STD),
        fit=_one(fits, preprocessing.get("resize_mode", "shortest"), "preprocess_cfg.resize_mode"),
        largest=text.get("pool_type", "argmax") == "argmax",
    )


# Of each part of a config: the fields that are read, or that do not change what a trained model computes; and the value of
# others at which a model of ours computes the same.
Fields = tuple[frozenset[str], Mapping[str, Any]]
WHOLE: Fields = (
    frozenset(
        {"embed_dim", "quick_gelu", "vision_cfg", "text_cfg", "custom_text", "init_logit_scale", "init_logit_bias"}
    ),
    {"cast_dtype": None, "output_dict": False, "nonscalar_logit_scale": False},
)
VISION: Fields = (
    frozenset(
        {
            "image_size",
            "layers",
            "width",
            "head_width",
            "mlp_ratio",
            "patch_size",
            "pool_type",
            "act_kwargs",
            "norm_kwargs",
        }
    )
    | {"patch_dropout", "output_tokens"},
    {
        "ls_init_value": None,
        "attentional_pool": False,
        "no_ln_pre": False,
        "pos_embed_type": "learnable",
        "final_ln_after_pool": False,
        "input_patchnorm": False,
        "timm_model_name": None,
    },
)
TEXT: Fields = (
    frozenset({"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio", "pool_type", "no_causal_mask"})
    | {"act_kwargs", "norm_kwargs", "hf_tokenizer_name", "tokenizer_kwargs", "text_mask", "eos_id", "bos_id", "pad_id"}
    | {"output_tokens"},
    {
        "ls_init_value": None,
        "embed_cls": False,
        "final_ln_after_pool": False,
        "proj_bias": False,
        "proj_type": "linear",
        "hf_model_name": None,
    },
)


def refuse_others(config: Mapping[str, Any], part: str, read: Collection[str], neutral: Mapping[str, Any]) -> None:
    """Raises UserError for a field that changes what a model computes in a way that ours cannot."""
    for name, value in config.items():
        if name not in read and not (name in neutral and value == neutral[name]):
            place = f"{part}.{name}" if part else name
            raise UserError(f"its open_clip config has {place} {value!r}, which is not supported")


def _gelu(options: Mapping[str, Any]) -> Activation:
    return "gelu_tanh" if options.get("approximate") == "tanh" else "gelu"


def _one(known: Mapping[str, Any], value: Any, field: str) -> Any:
    if value not in known:
        raise UserError(f"its open_clip config has {field} {value!r}; there are {', '.join(known)}")
    return known[value]


def _rgb(values: Sequence[float] | None, default: RGB) -> RGB:
    if values is None:
        return default
    red, green, blue = values
    return (red, green, blue)


def clip_config(weights: Weights, settings: Settings) -> ModelConfig:
    """The model of the tensors."""
    width, _, patch, _ = weights["visual.conv1.weight"].shape
    positions, text_width = weights["positional_embedding"].shape
    config = sizes.clip(
        sizes.Tower(len(layer_numbers(weights, IMAGE_LAYERS)), width, settings.heads),
        sizes.Tower(len(layer_numbers(weights, TEXT_LAYERS)), text_width, settings.text_heads),
        width=weights["text_projection"].shape[1],
        size=isqrt(len(weights["visual.positional_embedding"])) * patch,
        patch=patch,
        positions=positions,
        activation=settings.activation,
    )
    image, text, embed = config.image, config.text, config.embed
    assert isinstance(image, ViTConfig) and isinstance(text, TextTransformerConfig) and embed is not None
    hidden, text_hidden = (len(weights[f"{prefix}0.mlp.c_fc.weight"]) for prefix in (IMAGE_LAYERS, TEXT_LAYERS))
    seen = settings.text_mask == "none" or settings.text_pool == "end"
    return replace(
        config,
        image=replace(
            image,
            layer=replace(image.layer, hidden=hidden, eps=settings.eps),
            norm_eps=settings.eps,
            mean=settings.mean,
            std=settings.std,
        ),
        text=replace(text, layer=replace(text.layer, hidden=text_hidden, eps=settings.text_eps), learn_pad=seen),
        embed=replace(
            embed,
            image=replace(embed.image, pool=settings.image_pool),
            text=replace(embed.text, pool=settings.text_pool, eps=settings.text_eps),
            text_mask=settings.text_mask,
            text_length=positions if seen else None,
        ),
    )


def clip_release(weights: Weights, settings: Settings) -> Release:
    """The model of the tensors, with its temperature."""
    config = clip_config(weights, settings)
    scale = weights["logit_scale"].float().reshape(())
    objectives: dict[str, ObjectiveConfig] = {"clip": CLIPConfig()}
    learned = {"clip.log_scale": scale}
    if "logit_bias" in weights:
        objectives = {"siglip": SigLIPConfig()}
        learned = {"siglip.log_scale": scale, "siglip.bias": weights["logit_bias"].float().reshape(())}
    sees_padding = config.embed is not None and config.embed.text_length is not None
    return Release(
        config=config,
        weights=from_open_clip(weights),
        data={"max_length": config.text.positions, "fit": settings.fit, "captions": "captions"},
        objectives=objectives,
        objective_weights=learned,
        needs=frozenset({"bos", "eos", "pad"} if sees_padding else {"bos", "eos"}),
        ends_in_largest=settings.largest,
    )


class OpenCLIPLayout(Layout):
    name = "open_clip"
    summary = "ViT and text transformer of open_clip, with its open_clip_config.json or as a state dict"
    options = ("activation", "heads")

    @classmethod
    def described(cls, source: Checkpoint) -> bool:
        # Repositories of the hub often have the same model in the layout of transformers.
        return source.open_clip is not None and source.model_type is None

    @classmethod
    def recognises(cls, source: Checkpoint) -> bool:
        return ANCHOR in source.names and SIZE not in source.names

    def read(self, source: Checkpoint, stated: Stated) -> Release:
        settings = read_settings(source, stated)
        weights = {name.removeprefix("text."): x for name, x in source.weights.items()}
        return clip_release(weights, settings)


class OpenAILayout(Layout):
    name = "openai"
    summary = "CLIP's ViT models as OpenAI publishes them: an archive, or its state dict"

    @classmethod
    def recognises(cls, source: Checkpoint) -> bool:
        return {ANCHOR, SIZE} <= source.names

    def read(self, source: Checkpoint, stated: Stated) -> Release:
        # clip/model.py of openai/CLIP: QuickGELU, and heads of 64 numbers.
        weights = source.weights
        heads = (len(weights["visual.conv1.weight"]), weights["positional_embedding"].shape[1])
        settings = Settings(activation="quick_gelu", heads=heads[0] // 64, text_heads=heads[1] // 64)
        return clip_release(weights, settings)
