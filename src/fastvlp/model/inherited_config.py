"""Makes the config of a model that starts from a saved one: the parts of the recipe with the saved model's encoders."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, TypeVar

from torch import Tensor

from fastvlp.config import Json, to_json
from fastvlp.errors import UserError
from fastvlp.model.encoders.absent_encoders import AbsentTextsConfig
from fastvlp.model.encoders.interface import ImageEncoderConfig, TextEncoderConfig
from fastvlp.model.fusion import FusionConfig, ReconstructorConfig
from fastvlp.model.joint_space import EmbedConfig, HeadConfig
from fastvlp.model.layers import LayerConfig
from fastvlp.model.model import ModelConfig
from fastvlp.model.saving import Saved
from fastvlp.model.single_stream import SingleConfig

T = TypeVar("T")
# Fields that may differ between a run and the weights from which it starts. Positions are resized, pixels are prepared as in
# the training of the weights, the vocabulary is that of the tokenizer, and dropout only matters in training.
FREE = {"size", "mean", "std", "positions", "vocab", "pad", "bos", "eos", "mask"}
FREE |= {"dropout", "dropout_rate", "drop_connect_rate"}
# Fields of a joint space that decide how the text encoder reads a text.
READING = ("text_mask", "text_special", "text_start", "text_length", "text_pad")


def inherited_config(saved: ModelConfig, like: ModelConfig) -> ModelConfig:
    """Returns the model of a recipe, `like`, for a run that starts from a saved model.

    If an encoder of the recipe computes the same as the saved one, it is kept, with its own image size and number of positions.
    Any other encoder is replaced by the saved one. The same applies to the fusion layers, the reconstructor, the joint space
    and the single stream of the recipe. Those that the saved model lacks get the width of its encoders. Raises UserError if the
    recipe has a single stream over words and regions and the saved model has none.
    """
    image, text = _image(saved.image, like.image), _text(saved.text, like.text)
    if like.single is not None:
        return replace(like, image=image, text=text, single=_single(saved.single, like.single, image))
    if saved.single is not None:
        raise UserError(
            "the saved model is one stream over words and regions, and the recipe has an encoder of texts; take a recipe of "
            "such a stream (uniter_demo, uniter_base), or other weights"
        )
    # A part of another width must not be used: its weights would be wrong or could not be loaded.
    fusion = _kept(saved.fusion, like.fusion) if saved.text.present else like.fusion
    reconstructor = _kept(saved.reconstructor, like.reconstructor) if saved.text.present else like.reconstructor
    config = replace(like, image=image, text=text)
    return replace(
        config,
        fusion=None if fusion is None else replace(fusion, layer=with_width(fusion.layer, text.width)),
        reconstructor=_reconstructor(reconstructor, fusion, text),
        embed=_joint_space(saved, config),
    )


def with_image(like: ModelConfig, image: ImageEncoderConfig) -> ModelConfig:
    """Returns the model of a recipe with another image encoder. The parts that read its states get the right width."""
    if like.single is not None:
        regions = replace(like.single.regions, feature=image.width)
        return replace(like, image=image, single=replace(like.single, regions=regions))
    text = AbsentTextsConfig(positions=like.text.positions, width=like.text.width, depth=like.text.depth)
    return inherited_config(ModelConfig(image=image, text=text), like)


def inheritable_weights(saved: Saved, config: ModelConfig) -> dict[str, Tensor]:
    """Returns the weights of a saved model that a model of `config` may inherit. Left out are weights that were never trained,
    a head of the joint space that reads other inputs than that of `config`, and the layers of a text encoder if a decoder has
    only a table of words in its place."""
    own, new = saved.model.config.embed, config.embed
    left_out = list(saved.info.get("untrained", ()))
    if own is not None and new is not None:
        heads = {"embed.image.": (own.image, new.image), "embed.text.": (own.text, new.text)}
        left_out += [
            name for name, (old, head) in heads.items() if own.width != new.width or not same_weights(old, head)
        ]
    if config.fusion is not None and config.text.depth == 0 and _two_encoders(saved.model.config):
        left_out.append("text.")
    state = saved.model.state_dict()
    return {name: x for name, x in state.items() if not name.startswith(tuple(left_out) or ("\0",))}


def _two_encoders(config: ModelConfig) -> bool:
    return config.fusion is None and config.single is None and config.text.depth > 0


def with_width(layer: LayerConfig, width: int) -> LayerConfig:
    """Returns a layer of the same kind for states of another width. Its heads have at most 64 dimensions, and its MLP has the
    same ratio to the width."""
    if layer.width == width:
        return layer
    heads = next(n for n in range(-(-width // 64), width + 1) if width % n == 0)
    return replace(layer, width=width, heads=heads, hidden=width * layer.hidden // layer.width)


def same_weights(one: Any, other: Any) -> bool:
    """Whether weights of one config compute the same with the other: the configs differ at most in `FREE` fields."""
    pair = (config.normal_form() if isinstance(config, ImageEncoderConfig) else config for config in (one, other))
    mine, theirs = (_stripped(to_json(config)) for config in pair)
    return mine == theirs


def _stripped(value: Json) -> Json:
    if isinstance(value, dict):
        return {name: _stripped(inner) for name, inner in value.items() if name not in FREE}
    return value


def _kept(saved: T | None, like: T | None) -> T | None:
    """Returns the recipe's part if it computes the same as the saved one, otherwise the saved one; None if the recipe has no
    such part."""
    return saved if saved is not None and like is not None and not same_weights(saved, like) else like


def _image(saved: ImageEncoderConfig, like: ImageEncoderConfig) -> ImageEncoderConfig:
    if not saved.present:
        return like
    return replace(like, mean=saved.mean, std=saved.std) if same_weights(saved, like) else saved


def _text(saved: TextEncoderConfig, like: TextEncoderConfig) -> TextEncoderConfig:
    return like if not saved.present or same_weights(saved, like) else saved


def _single(saved: SingleConfig | None, like: SingleConfig, image: ImageEncoderConfig) -> SingleConfig:
    if saved is None:
        raise UserError(
            "the recipe has one stream over words and regions, and the saved model has none; take another recipe, or weights "
            "of such a stream: `vlp convert BERT OUT --layout uniter_start` makes some of BERT"
        )
    single = saved if not same_weights(saved, like) else like
    regions = single.regions
    return replace(single, regions=regions if regions.pool is None else replace(regions, feature=image.width))


def _reconstructor(
    part: ReconstructorConfig | None, fusion: FusionConfig | None, text: TextEncoderConfig
) -> ReconstructorConfig | None:
    if part is None or fusion is None:
        return None
    bottom, top = min(part.bottom, text.depth), min(part.top, fusion.depth)
    return replace(part, bottom=bottom, top=top, layer=with_width(part.layer, text.width))


def _joint_space(saved: ModelConfig, config: ModelConfig) -> EmbedConfig | None:
    """Returns the recipe's joint space on the encoders of `config`. Each head that reads the same kind of states as the saved
    head is replaced by it. Texts are read as in the training of the saved text encoder."""
    if config.embed is None:
        return None
    like, own = _fitted(config.embed, config), saved.embed
    if own is None:
        return like
    fields: dict[str, Any] = {}
    if saved.image.present and _reads_alike(own.image, like.image):
        fields["image"] = own.image
    if saved.text.present and _reads_alike(own.text, like.text):
        fields["text"] = own.text
    if fields and saved.image.present and saved.text.present:
        fields["width"] = own.width
    if saved.text.present:
        fields |= {name: getattr(own, name) for name in READING}
    made = replace(like, **fields)
    return like if same_weights(made, like) else made


def _fitted(like: EmbedConfig, config: ModelConfig) -> EmbedConfig:
    """Returns the recipe's heads on other encoders."""
    image, text, prefix = like.image, like.text, config.image.prefix
    if image.pool in ("first", "patches") and not prefix:
        image = replace(image, pool="mean")
    if image.layer is not None and image.regions is None:
        image = replace(image, layer=with_width(image.layer, config.image.width))
    if text.layer is not None:
        text = replace(text, layer=with_width(text.layer, config.text.width))
    text = replace(text, norm=not config.text.final_norm, eps=config.text.norm_eps)
    length = None if like.text_length is None else min(like.text_length, config.text.positions)
    return replace(like, image=image, text=text, text_length=length)


def _reads_alike(one: HeadConfig, other: HeadConfig) -> bool:
    """Whether both heads read the states directly, or regions of the same source, and through the same number of layers."""
    grids = [None if head.regions is None else (head.regions.grid,) for head in (one, other)]
    return grids[0] == grids[1] and bool(one.depth) == bool(other.depth)
