"""Sizes by name: the functions of `model/sizes.py` that need no arguments, for `vlp pretrain RECIPE --model NAME`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from difflib import get_close_matches

from fastvlp.errors import UserError
from fastvlp.model import sizes, tower_sizes
from fastvlp.model.model import ModelConfig
from fastvlp.model.sizes import joint_space, single_over_patches


def named_sizes() -> Mapping[str, Callable[[], ModelConfig]]:
    """Returns all sizes, by name."""
    return {
        name: function
        for name, function in inspect.getmembers(sizes, inspect.isfunction)
        if function.__module__ in (sizes.__name__, tower_sizes.__name__)
        and not name.startswith("_")
        and _is_size(function)
    }


def _is_size(function: Callable[..., object]) -> bool:
    signature = inspect.signature(function)
    complete = all(parameter.default is not parameter.empty for parameter in signature.parameters.values())
    return complete and signature.return_annotation == ModelConfig.__name__


def named_size(name: str, like: ModelConfig | None = None) -> ModelConfig:
    """Returns the model config of a named size. With `like` it is turned into a model of the same kind as `like`: two encoders,
    fusion layers, or a single stream.

    Parts that `like` lacks are left out, a joint space is added if `like` has one, and a single stream reads the same regions.
    Raises UserError for an unknown name, with the nearest names, and for a size that cannot be turned into this kind, with the
    sizes that can.
    """
    known = named_sizes()
    if name not in known:
        near = get_close_matches(name, known, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(known)}"
        raise UserError(f"{name}: no such size of models; {hint}")
    config = known[name]()
    if like is None:
        return config
    if lacking := _lacking(config, like):
        fitting = [other for other, function in known.items() if not _lacking(function(), like)]
        raise UserError(
            f"size {name} has no {lacking}, which the model of this recipe has; sizes that do: {', '.join(fitting) or 'none'}"
        )
    return _of_kind(config, like)


def _lacking(config: ModelConfig, like: ModelConfig) -> str | None:
    """A part of `like` that `config` has not, and from which it cannot be made."""
    pools_patches = like.single is not None and like.single.regions.pool is not None
    if like.single and not pools_patches:
        return None if config.single else "single stream over words and regions"
    if config.single:
        return "encoders of images and texts"
    if (like.fusion or pools_patches) and not config.fusion:
        return "fusion layers"
    if like.reconstructor and not config.reconstructor:
        return "reconstructor"
    if _has_region_heads(like) and not _has_region_heads(config):
        return "heads over regions"
    return None


def _has_region_heads(config: ModelConfig) -> bool:
    return config.embed is not None and config.embed.image.regions is not None


def _of_kind(config: ModelConfig, like: ModelConfig) -> ModelConfig:
    if like.single is not None:
        if like.single.regions.pool is not None:
            config = single_over_patches(config, pool=like.single.regions.pool)
        assert config.single is not None
        # Of regions, all but the width of pooled states is the data's.
        feature = config.image.width if like.single.regions.pool is not None else like.single.regions.feature
        regions = replace(like.single.regions, feature=feature)
        return replace(config, single=replace(config.single, regions=regions, types=like.single.types))
    embed = None
    if like.embed is not None:
        same = config.embed is not None and _has_region_heads(config) == _has_region_heads(like)
        embed = config.embed if same else joint_space(config, width=like.embed.width)
    if embed and like.embed and embed.image.regions and like.embed.image.regions:
        # Boxes of the data or a grid: that is the recipe's.
        pooled = replace(embed.image.regions, grid=like.embed.image.regions.grid)
        embed = replace(embed, image=replace(embed.image, regions=pooled))
    return replace(
        config,
        fusion=config.fusion if like.fusion else None,
        reconstructor=config.reconstructor if like.reconstructor else None,
        embed=embed,
        separate_heads=like.separate_heads,
    )
