"""Models of an image and a text encoder in transformers: CLIP, SigLIP, Chinese CLIP, and vision-text-dual-encoder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastvlp.convert.checkpoint_source import Checkpoint
from fastvlp.convert.encoder_family import TextReading
from fastvlp.convert.interface import Layout, Release, Role, Stated
from fastvlp.convert.public_encoders import IMAGE, TEXT, PublicImages, PublicTexts, read_images, read_texts
from fastvlp.convert.public_model import pair_scale, public_weights
from fastvlp.convert.weight_map import Weights
from fastvlp.errors import UserError
from fastvlp.model.encoders.interface import ImageEncoderConfig, TextEncoderConfig
from fastvlp.model.encoders.transformers_models import transformers
from fastvlp.model.joint_space import EmbedConfig, HeadConfig
from fastvlp.model.model import ModelConfig
from fastvlp.objectives.clip import CLIPConfig
from fastvlp.objectives.objective import ObjectiveConfig
from fastvlp.objectives.siglip import SigLIPConfig

PAIR = "vision-text-dual-encoder"


def has_parts(source: Checkpoint) -> bool:
    """Whether a config describes an image and a text encoder."""
    return all(part in source.settings or f"{part}_dict" in source.settings for part in (IMAGE, TEXT))


def joined(
    image: ImageEncoderConfig, text: TextEncoderConfig, head: HeadConfig, reading: TextReading, width: int
) -> ModelConfig:
    """Two encoders with a joint space of `width` numbers; `head` is that of the images, the other in `reading`."""
    embed = EmbedConfig(
        width=width,
        image=head,
        text=replace(reading.head, norm=not text.final_norm, eps=text.norm_eps),
        text_mask=reading.mask,
        text_start=reading.start,
        text_length=reading.length,
        text_pad=reading.pad,
    )
    return ModelConfig(image=image, text=text, embed=embed)


def tokens_read(texts: PublicTexts) -> frozenset[Role]:
    """The special tokens that a text encoder reads, or that it is summarised at."""
    return frozenset({"bos", "eos"} if texts.reading.start else {"eos"})


def pair_release(
    images: PublicImages,
    texts: PublicTexts,
    config: ModelConfig,
    weights: Mapping[str, Tensor],
    scale: Mapping[str, Tensor],
    **fields: Any,
) -> Release:
    """A model of two encoders with its temperature, `scale`; with a bias beside it, it was trained by SigLIP's loss."""
    name, objective = ("siglip", SigLIPConfig()) if "bias" in scale else ("clip", CLIPConfig())
    objectives: dict[str, ObjectiveConfig] = {name: objective}
    return Release(
        config=config,
        weights=weights,
        data={"max_length": config.longest_text, "fit": images.preprocessing.fit, "captions": "captions"},
        objectives=objectives,
        objective_weights={f"{name}.{key}": x for key, x in scale.items()},
        needs=tokens_read(texts),
        **fields,
    )


class TwoEncodersLayout(Layout):
    name = "transformers"
    summary = "clip, siglip and chinese_clip of transformers, with their config.json"

    @classmethod
    def described(cls, source: Checkpoint) -> bool:
        return source.model_type is not None and source.model_type != PAIR and has_parts(source)

    def read(self, source: Checkpoint, stated: Stated) -> Release:
        images, texts = read_images(source), read_texts(source)
        if images.joint is None or images.joint != texts.joint:
            raise UserError(f"a {source.model_type}, whose image and text encoder have no joint space")
        config = joined(images.config, texts.config, images.head, texts.reading, images.joint)
        text = source.settings.get(TEXT) or {}
        legacy = texts.reading.head.pool == "last" and text.get("eos_token_id", 2) == 2
        weights = public_weights(config, images, texts)
        return pair_release(images, texts, config, weights, pair_scale(images, texts), ends_in_largest=legacy)


class EncoderPairLayout(Layout):
    name = "encoder_pair"
    summary = "vision-text-dual-encoder of transformers, with its config.json"

    @classmethod
    def described(cls, source: Checkpoint) -> bool:
        return source.model_type == PAIR

    def read(self, source: Checkpoint, stated: Stated) -> Release:
        images, texts = read_images(source), read_texts(source)
        weights = source.weights
        head, state = _head(weights, "image", images.head, images.config.width)
        text_head, text_state = _head(weights, "text", HeadConfig(pool="first"), texts.config.width)
        reading = replace(texts.reading, head=text_head)
        config = joined(images.config, texts.config, head, reading, len(weights["visual_projection.weight"]))
        for name, part in (("image", images), ("text", texts)):
            own = part.weights() if part.ours else _computed_by_transformers(source, name)
            state |= {f"{name}.{key}": x for key, x in own.items()}
        scale = {"log_scale": weights["logit_scale"].reshape(())}
        return pair_release(images, texts, config, state | text_state, scale)


def _head(weights: Weights, part: str, plain: HeadConfig, width: int) -> tuple[HeadConfig, dict[str, Tensor]]:
    """The head of one encoder's pooled state, and its parameters: a pooler where the encoder has one (a matrix and tanh on the
    first state), then the projection."""
    names = {"image": ("vision_model.", "visual_projection"), "text": ("text_model.", "text_projection")}
    prefix, projection = names[part]
    state = {f"embed.{part}.out.weight": weights[f"{projection}.weight"]}
    pooler = {name: x for name, x in weights.items() if name.startswith(prefix) and ".pooler.dense." in name}
    if not pooler:
        return plain, state
    state |= {f"embed.{part}.hidden.{name.rpartition('.')[2]}": x for name, x in pooler.items()}
    return replace(plain, pool="first", hidden=width, hidden_activation="tanh"), state


def _computed_by_transformers(source: Checkpoint, part: str) -> dict[str, Tensor]:
    """Parameters of an encoder of a pair, by the names that transformers gives them in memory."""
    try:
        pair = transformers().VisionTextDualEncoderModel.from_pretrained(
            source.files[0].parent, local_files_only=True, dtype=torch.float32
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"cannot be loaded ({str(error).partition(chr(10))[0]})") from error
    encoder = {"image": pair.vision_model, "text": pair.text_model}[part]
    return {f"model.{name}": x for name, x in encoder.state_dict().items()}
