"""A model made of public encoders: its config, and the weights that come with them."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fastvlp.convert.public_encoders import PublicImages, PublicTexts
from fastvlp.errors import UserError
from fastvlp.model.encoders.absent_encoders import AbsentImagesConfig, AbsentTextsConfig
from fastvlp.model.inherited_config import inherited_config, with_image
from fastvlp.model.joint_space import EmbedConfig, HeadConfig
from fastvlp.model.model import ModelConfig
from fastvlp.model.single_stream import SingleConfig


def with_encoders(like: ModelConfig, images: PublicImages | None, texts: PublicTexts | None) -> ModelConfig:
    """The model of a recipe with public encoders in place of its own (`inherited_config`).

    A single stream over words and regions takes the layers of the text encoder, as UNITER begins with BERT. The joint space is
    that of the public model where both encoders come from one. Raises UserError if the recipe's model cannot be made of the
    encoders.
    """
    public = public_config(like, images, texts)
    if like.single is None:
        return inherited_config(public, like)
    if images is not None and like.single.regions.pool is None:
        raise UserError(
            f"{images.folder.source}: the recipe's model reads stored regions or their pixels, with no image encoder; take a "
            "recipe whose regions are pooled from one (uniter_end2end)"
        )
    return inherited_config(public, like) if public.single is not None else with_image(like, public.image)


def public_config(like: ModelConfig, images: PublicImages | None, texts: PublicTexts | None) -> ModelConfig:
    """The public encoders as a model, with the parts that they bring along."""
    image = AbsentImagesConfig(size=like.image.size, width=like.image.width) if images is None else images.config
    if like.single is not None and texts is not None:
        if texts.layer is None:
            raise UserError(
                f"{texts.folder.source}: it cannot be used as a single stream over words and regions; choose a BERT"
            )
        single = SingleConfig(
            depth=texts.config.depth, layer=texts.layer, regions=like.single.regions, types=like.single.types
        )
        return ModelConfig(image=image, text=texts.config.with_depth(0), single=single)
    text = (
        AbsentTextsConfig(positions=like.text.positions, width=like.text.width, depth=like.text.depth)
        if texts is None
        else texts.config
    )
    return ModelConfig(image=image, text=text, embed=_joint_space(like, images, texts))


def _joint_space(like: ModelConfig, images: PublicImages | None, texts: PublicTexts | None) -> EmbedConfig | None:
    if like.embed is None:
        return None
    joint, plain = joint_width(images, texts), HeadConfig(pool="mean")
    width = joint or like.embed.width
    image = _head(like.embed.image, images.head, images.joint) if images else plain
    # In another joint space than that of the public model its summary has to be projected.
    image = image if joint else replace(image, project=True)
    if texts is None:
        return EmbedConfig(width=width, image=image, text=plain)
    reading = texts.reading
    text = _head(like.embed.text, reading.head, texts.joint)
    return EmbedConfig(
        width=width,
        image=image,
        text=replace(text, norm=not texts.config.final_norm, eps=texts.config.norm_eps),
        text_mask=reading.mask,
        text_start=reading.start,
        text_length=reading.length,
        text_pad=reading.pad,
    )


def _head(like: HeadConfig, public: HeadConfig, joint: int | None) -> HeadConfig:
    """The public model's head where it was trained, else the recipe's, which summarises states as the public model does. The
    recipe's own layers and queries stay."""
    if joint is not None or like.depth or like.regions:
        return public
    return like if like.pool == "attention" else replace(like, pool=public.pool)


def joint_width(images: PublicImages | None, texts: PublicTexts | None) -> int | None:
    """Width of the joint space of a public model, where both encoders are its."""
    if images is None or texts is None or images.folder.source != texts.folder.source:
        return None
    return images.joint if images.joint == texts.joint else None


def public_weights(config: ModelConfig, images: PublicImages | None, texts: PublicTexts | None) -> dict[str, Tensor]:
    """The weights of public encoders by the names that a model of `config` has for them. Those of encoders are at the published
    image size, vocabulary and number of positions."""
    weights: dict[str, Tensor] = {}
    if images is not None:
        weights |= {f"image.{name}": x for name, x in images.weights().items()}
        weights |= {f"embed.image.{name}": x for name, x in images.projection().items()}
    if texts is not None:
        own = texts.weights()
        weights |= _stream(config.single, own, texts.types()) if config.single else _named("text.", own)
        weights |= {f"embed.text.{name}": x for name, x in texts.projection().items()}
    return weights


def pair_scale(images: PublicImages | None, texts: PublicTexts | None) -> dict[str, Tensor]:
    """Returns the factor and the bias of a public model's cosines, under the names of our objectives: `log_scale` and
    `bias`."""
    if images is None or joint_width(images, texts) is None:
        return {}
    weights = images.folder.weights
    names = {"log_scale": "logit_scale", "bias": "logit_bias"}
    return {ours: weights[theirs].reshape(()) for ours, theirs in names.items() if theirs in weights}


def _named(prefix: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: x for name, x in weights.items()}


def _stream(single: SingleConfig, weights: dict[str, Tensor], types: Tensor | None) -> dict[str, Tensor]:
    """A text encoder as the embedding and the layers of a single stream."""
    stream: dict[str, Tensor] = {}
    for name, x in weights.items():
        part, _, rest = name.partition(".")
        stream[{"blocks": f"single.{name}", "last_norm": f"single.norm.{rest}"}.get(part, f"text.{name}")] = x
    if types is not None and len(types) > 1:
        # Positions have the first type in them, which is that of words; regions have no positions, and the second.
        stream["single.kinds"] = torch.cat([torch.zeros_like(types[:1]), types[1:2].expand(single.types - 1, -1)])
    return stream
