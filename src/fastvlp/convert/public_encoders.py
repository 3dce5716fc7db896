"""Encoders of public models in the layout of transformers, from a folder or the hub: as ours where a family says that the
weights fit, otherwise as transformers computes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fastvlp.convert.encoder_family import EncoderFamily, ImageFamily, TextFamily, TextReading
from fastvlp.convert.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Preprocessing, read_preprocessing
from fastvlp.convert.public_folder import TOKENIZERS, PublicFolder, open_public
from fastvlp.data.tokenize import Tokenizer
from fastvlp.errors import UserError
from fastvlp.extensions import variants
from fastvlp.model.encoders.interface import ImageEncoderConfig, TextEncoderConfig
from fastvlp.model.encoders.transformers_image import TransformersImageConfig
from fastvlp.model.encoders.transformers_models import architecture_of, model_config, quiet_transformers, transformers
from fastvlp.model.encoders.transformers_text import TransformersTextConfig
from fastvlp.model.joint_space import HeadConfig
from fastvlp.model.layers import LayerConfig

F = TypeVar("F", bound=EncoderFamily)
# Parts of a two-encoder model by the names that transformers gives them.
IMAGE, TEXT = "vision_config", "text_config"


@dataclass(frozen=True, kw_only=True)
class PublicImages:
    """A public image encoder."""

    folder: PublicFolder
    config: ImageEncoderConfig
    preprocessing: Preprocessing
    head: HeadConfig
    """How its states become one vector."""
    joint: int | None = None
    """Width of the joint space that `projection` leads to; None if there is none."""
    weights: Callable[[], dict[str, Tensor]]
    """Reads the parameters of the module that `config` builds at the size that the model was published with."""
    projection: Callable[[], dict[str, Tensor]]
    """Reads the parameters of a `Head` of a joint space; empty if the model has none."""
    ours: bool = True
    """Whether it is our vision transformer, and is not computed by transformers."""


@dataclass(frozen=True, kw_only=True)
class PublicTexts:
    """A public text encoder."""

    folder: PublicFolder
    config: TextEncoderConfig
    reading: TextReading
    """How its states become one vector."""
    joint: int | None = None
    """Width of the joint space that `projection` leads to; None if there is none."""
    weights: Callable[[], dict[str, Tensor]]
    """Reads the parameters of the module that `config` builds with the vocabulary and positions of the published model."""
    projection: Callable[[], dict[str, Tensor]]
    """Reads the parameters of a `Head` of a joint space; empty if the model has none."""
    types: Callable[[], Tensor | None]
    """Reads the vectors of the token types, of which the first one is in the positions; None if there are none."""
    ours: bool = True
    """Whether it is our text transformer, and is not computed by transformers."""
    layer: LayerConfig | None = None
    """Shape of its layers, where a single stream over words and regions can be made of them."""


def read_images(source: str | PublicFolder, *, layers: int | None = None, ours: bool = True) -> PublicImages:
    """The image encoder of a public model. Weights are read when they are needed.

    Args:
        source: a folder in the layout of transformers, or the name of a repository of the Hugging Face hub.
        layers: how many of its first layers to take; None for all.
        ours: take our vision transformer where the weights fit it.

    Raises UserError if there is no such model, it has no image encoder, or it has fewer layers.
    """
    folder = open_public(source)
    config = part_config(folder, IMAGE)
    family = find_family(ImageFamily, config) if ours else None
    own = family.config(config) if family is not None else None
    if family is None or own is None:
        return _transformers_images(folder, config, layers)
    known = read_preprocessing(
        folder, Preprocessing(size=None, fit=family.fit, mean=family.mean, std=family.std, stated=False)
    )
    depth = cut_depth(own.depth, layers, folder)
    size = known.size if known.size is not None and known.size % own.patch == 0 else own.size
    return PublicImages(
        folder=folder,
        config=replace(own, depth=depth, size=size, mean=known.mean, std=known.std),
        preprocessing=known,
        head=family.head(config),
        joint=family.joint(config, folder.config),
        weights=lambda: _named(folder, lambda: family.encoder(folder.weights, depth)),
        projection=lambda: _named(folder, lambda: family.projection(folder.weights)),
    )


def read_texts(source: str | PublicFolder, *, layers: int | None = None, ours: bool = True) -> PublicTexts:
    """The text encoder of a public model; arguments and errors as of `read_images`."""
    folder = open_public(source)
    config = part_config(folder, TEXT)
    family = find_family(TextFamily, config) if ours else None
    own = family.config(config) if family is not None else None
    if family is None or own is None:
        return _transformers_texts(folder, config, layers)
    depth = cut_depth(own.depth, layers, folder)
    reading = family.reading(config)
    return PublicTexts(
        folder=folder,
        config=own.with_depth(depth),
        layer=own.layer,
        reading=replace(reading, head=_pooled_as_stated(folder, reading.head)),
        joint=family.joint(config, folder.config),
        weights=lambda: _named(folder, lambda: family.encoder(folder.weights, depth)),
        projection=lambda: _named(folder, lambda: family.projection(folder.weights)),
        types=lambda: _named(folder, lambda: family.types(folder.weights)),
    )


def part_config(folder: PublicFolder, part: str) -> dict[str, Any]:
    """The config of one encoder of a model, or of the model itself where it is that encoder. Raises UserError if it has
    no such part."""
    config, other = folder.config, TEXT if part == IMAGE else IMAGE
    # Files of the first versions have what differs from the defaults in a second mapping.
    inner = {**(config.get(part) or {}), **(config.get(f"{part}_dict") or {})}
    if part in config or inner:
        name = {IMAGE: "vision_model", TEXT: "text_model"}[part]
        return {"model_type": f"{config['model_type']}_{name}", **inner}
    if other in config:
        raise UserError(f"{folder.source}: a {config['model_type']} without {part}")
    return dict(config)


def find_family(base: type[F], config: Mapping[str, Any]) -> F | None:
    """The family whose encoders a config.json describes, also one of a user's own file."""
    families = [kind for kind in variants(base, __package__) if config.get("model_type") in kind.model_types]
    return families[-1]() if families else None


def cut_depth(depth: int, layers: int | None, folder: PublicFolder) -> int:
    """Returns the number of layers to use. Raises UserError if the model has fewer."""
    if layers is not None and not 0 <= layers <= depth:
        raise UserError(f"{folder.source}: has {depth} layers; use at most this number, not {layers}")
    return depth if layers is None else layers


def read_tokenizer(folder: PublicFolder, path: str | None = None) -> Tokenizer:
    """A model's tokenizer, from `path` where one is named. Special tokens that it lacks are added at its end.

    Raises UserError if there is none, or it can only be read by a package that is not installed.
    """
    named = path if path is not None else folder.find("tokenizer.json")
    if named is not None:
        return Tokenizer.load(named, complete=True)
    if not any(folder.find(name) for name in TOKENIZERS):
        raise UserError(f"{folder.source}: it has no tokenizer; name a tokenizer.json with `tokenizer`")
    try:
        slow = transformers().AutoTokenizer.from_pretrained(folder.whole(), local_files_only=True)
        inner = slow.backend_tokenizer
    except (ImportError, OSError, ValueError, AttributeError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"{folder.source}: its tokenizer cannot be read ({reason}); save it once with `save_pretrained` of transformers, "
            "which writes a tokenizer.json, and name that with `tokenizer`"
        ) from error
    return Tokenizer(inner, folder.source, complete=True)


def _pooled_as_stated(folder: PublicFolder, head: HeadConfig) -> HeadConfig:
    """Returns the encoder with the pooling that sentence-transformers saved beside the model, if it is the first state or
    the mean."""
    stated = folder.json("1_Pooling/config.json") or {}
    if stated.get("pooling_mode_cls_token"):
        return replace(head, pool="first")
    return replace(head, pool="mean") if stated.get("pooling_mode_mean_tokens") else head


def _transformers_images(folder: PublicFolder, config: dict[str, Any], layers: int | None) -> PublicImages:
    architecture = _cut_architecture(folder, config, layers)
    known = read_preprocessing(
        folder, Preprocessing(size=None, fit="crop", mean=IMAGENET_MEAN, std=IMAGENET_STD, stated=False)
    )
    own = architecture.get("image_size")
    size = known.size or (own if isinstance(own, int) else 224)
    encoder = TransformersImageConfig(size=size, mean=known.mean, std=known.std, architecture=architecture)
    unused = _named(folder, lambda: encoder.measured.unused)
    return PublicImages(
        folder=folder,
        config=encoder,
        preprocessing=known,
        head=HeadConfig(pool="first" if encoder.prefix else "mean"),
        weights=lambda: _transformers_weights(folder, architecture, unused),
        projection=dict,
        ours=False,
    )


def _transformers_texts(folder: PublicFolder, config: dict[str, Any], layers: int | None) -> PublicTexts:
    architecture = _cut_architecture(folder, config, layers)
    given = model_config(architecture)
    if not hasattr(given, "vocab_size") or given.is_encoder_decoder:
        raise UserError(f"{folder.source}: a {given.model_type}, which is not a text encoder")
    plain = TransformersTextConfig(
        positions=getattr(given, "max_position_embeddings", None) or 512,
        vocab=given.vocab_size,
        architecture=architecture,
        pad=given.pad_token_id or 0,
    )
    offset = _position_offset(plain)
    if offset:
        plain = replace(plain, positions=plain.positions - offset, position_offset=offset, pad_position=offset - 1)
    return PublicTexts(
        folder=folder,
        config=plain,
        reading=TextReading(head=_pooled_as_stated(folder, HeadConfig(pool="mean")), mask="full"),
        weights=lambda: _transformers_weights(folder, architecture, frozenset()),
        projection=dict,
        types=lambda: None,
        ours=False,
    )


def _position_offset(config: TransformersTextConfig) -> int:
    """Rows at the start of the position table that no token has, the last of which is that of padding."""
    with torch.device("meta"):
        tables = config.build().named_modules()
    rows = [x.padding_idx for name, x in tables if "position_embedding" in name and isinstance(x, nn.Embedding)]
    return rows[0] + 1 if rows and rows[0] is not None else 0


def _cut_architecture(folder: PublicFolder, config: dict[str, Any], layers: int | None) -> dict[str, Any]:
    try:
        given = model_config(config)
        if layers is not None:
            given.num_hidden_layers = cut_depth(given.num_hidden_layers, layers, folder)
    except UserError as error:
        raise UserError(f"{folder.source}: {error}") from error
    except (AttributeError, NotImplementedError) as error:
        raise UserError(f"{folder.source}: a {given.model_type}, whose number of layers is fixed") from error
    return architecture_of(given)


def _transformers_weights(
    folder: PublicFolder, architecture: Mapping[str, Any], unused: frozenset[str]
) -> dict[str, Tensor]:
    """Parameters as transformers loads them, `model.` before each name. Raises UserError if some are missing but `unused`
    ones and poolers."""
    files = folder.weight_files()
    try:
        with quiet_transformers():
            model, info = transformers().AutoModel.from_pretrained(
                files[0].parent,
                config=model_config(architecture),
                output_loading_info=True,
                local_files_only=True,
                dtype=torch.float32,
            )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise UserError(f"{folder.source}: cannot be loaded ({str(error).partition(chr(10))[0]})") from error
    missing = sorted(x for x in info["missing_keys"] if x not in unused and not x.startswith("pooler."))
    other = sorted(str(x[0] if isinstance(x, tuple) else x) for x in info["mismatched_keys"])
    if missing or other:
        raise UserError(
            f"{folder.source}: its weights are not those of its config.json: missing {missing[:3]}, of another shape "
            f"{other[:3]} ({len(missing)} and {len(other)} in all)"
        )
    return {f"model.{name}": x for name, x in model.state_dict().items()}


T = TypeVar("T")


def _named(folder: PublicFolder, read: Callable[[], T]) -> T:
    """The result of `read`, with the folder's name in its errors."""
    try:
        return read()
    except UserError as error:
        if str(error).startswith(folder.source):
            raise
        raise UserError(f"{folder.source}: {error}") from error
    except KeyError as error:
        raise UserError(f"{folder.source}: its weights have no {error.args[0]}") from error
