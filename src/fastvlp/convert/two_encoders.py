"""Models of an image and a text encoder in transformers: CLIP, SigLIP, Chinese CLIP, and vision-text-dual-encoder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from fastvlp.convert.checkpoint_source import Checkpoint
from fastvlp.convert.encoder_family import TextReading
from fastvlp.convert.interface import Layout, Release, Role, Stated
from fastvlp.convert.public_encoders import IMAGE, TEXT, PublicImages, PublicTexts, read_images, read_texts
from fastvlp.convert.public_model import pair_scale, public_weights
from fastvlp.errors import UserError
from fastvlp.model.encoders.interface import ImageEncoderConfig, TextEncoderConfig
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
    images: PublicImages, texts: PublicTexts, config: ModelConfig, weights: Mapping[str, Tensor], **fields: Any
) -> Release:
    """A model of two encoders with its temperature; with a bias beside it, it was trained by SigLIP's loss."""
    scale = pair_scale(images, texts)
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
    def recognises(cls, source: Checkpoint) -> bool:
        return source.model_type is not None and source.model_type != PAIR and has_parts(source)

    def read(self, source: Checkpoint, stated: Stated) -> Release:
        images, texts = read_images(source), read_texts(source)
        if images.joint is None or images.joint != texts.joint:
            raise UserError(f"a {source.model_type}, whose image and text encoder share no joint space")
        config = joined(images.config, texts.config, images.head, texts.reading, images.joint)
        text = source.settings.get(TEXT) or {}
        legacy = texts.reading.head.pool == "last" and text.get("eos_token_id", 2) == 2
        weights = public_weights(config, images, texts)
        return pair_release(images, texts, config, weights, ends_in_largest=legacy)


class EncoderPairLayout(Layout):
    name = "encoder_pair"
    summary = "vision-text-dual-encoder of transformers, with its config.json"

    @classmethod
    def recognises(cls, source: Checkpoint) -> bool:
        return source.model_type == PAIR

    def read(self, source: Checkpoint, stated: Stated) -> Release:
        images, texts = read_images(source), read_texts(source)
        weights = source.weights
        heads: dict[str, HeadConfig] = {}
        state: dict[str, Tensor] = {}
        for part, theirs, width, plain in (
            ("image", "vision_model", images.config.width, images.head),
            ("text", "text_model", texts.config.width, HeadConfig(pool="first")),
        ):
            pooler = {
                name: x for name, x in weights.items() if name.startswith(f"{theirs}.") and ".pooler.dense." in name
            }
            heads[part] = plain
            if pooler:
                # A matrix and tanh on the first state.
                heads[part] = replace(plain, pool="first", hidden=width, hidden_activation="tanh")
                state |= {f"embed.{part}.hidden.{name.rpartition('.')[2]}": x for name, x in pooler.items()}
            projection = {"image": "visual_projection", "text": "text_projection"}[part]
            state[f"embed.{part}.out.weight"] = weights[f"{projection}.weight"]
        reading = replace(texts.reading, head=heads["text"])
        width = len(weights["visual_projection.weight"])
        config = joined(images.config, texts.config, heads["image"], reading, width)
        own = public_weights(config, images, texts)
        return pair_release(images, texts, config, own | state)
