"""Preprocessing of a public model's images, read from its preprocessor_config.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastvlp.convert.public_folder import PublicFolder
from fastvlp.data.records.transform import CENTRE, Fit
from fastvlp.errors import UserError

RGB = tuple[float, float, float]
IMAGENET_MEAN: RGB = (0.485, 0.456, 0.406)
IMAGENET_STD: RGB = (0.229, 0.224, 0.225)


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """The square of `size` pixels (None: not stated) that an image becomes, and what is then done to its pixels."""

    size: int | None
    fit: Fit
    mean: RGB
    std: RGB
    stated: bool = True
    """Whether the model states it; otherwise it is its family's."""


def read_preprocessing(folder: PublicFolder, default: Preprocessing) -> Preprocessing:
    """Returns the preprocessing that the model states, or `default`. Raises UserError for a preprocessing that our fields
    cannot express.

    A margin that is cut off after resizing (256 to 224 pixels in DINOv2) is an eighth here, or none; resampling is bicubic.
    """
    stated = folder.json("preprocessor_config.json") or (folder.json("processor_config.json") or {}).get(
        "image_processor"
    )
    if stated is None:
        return default
    try:
        size, fit = _square(stated)
        mean, std = _normalisation(stated)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{folder.source}: a preprocessor_config.json of another kind ({error!r})") from error
    return Preprocessing(size=size, fit=fit, mean=mean, std=std)


def _square(stated: Mapping[str, Any]) -> tuple[int | None, Fit]:
    size = stated.get("size") if stated.get("do_resize", True) else None
    crop = stated.get("crop_size") if stated.get("do_center_crop") else None
    # An image is resized by its short side and cut, or squashed to both sides.
    cut = isinstance(size, dict) and "shortest_edge" in size
    cut |= isinstance(size, int) and (crop is not None or "crop_pct" in stated)
    side, resized = _side(crop if crop is not None else size), _side(size)
    if not cut:
        return side, "squash"
    # ConvNeXt states the share that is cut, which does not hold at 384 pixels and above.
    share = stated.get("crop_pct", 1) if crop is None and (side or 0) < 384 else (side or 1) / (resized or side or 1)
    return side, "centre" if share < (1 + CENTRE) / 2 else "crop"


def _side(size: Any) -> int | None:
    if size is None or isinstance(size, int):
        return size
    sides = {size["shortest_edge"]} if "shortest_edge" in size else {size["height"], size["width"]}
    if len(sides) > 1:
        raise ValueError(f"images of {size['height']} x {size['width']} pixels are not square")
    return int(sides.pop())


def _normalisation(stated: Mapping[str, Any]) -> tuple[RGB, RGB]:
    """Mean and standard deviation of pixels that are scaled to 0..1."""
    mean, std = [0.0] * 3, [1.0] * 3
    if stated.get("do_normalize", True):
        mean, std = [float(x) for x in stated["image_mean"]], [float(x) for x in stated["image_std"]]
    # A pixel p becomes (p * factor - offset - mean) / std.
    factor = 255 * float(stated.get("rescale_factor", 1 / 255)) if stated.get("do_rescale", True) else 255.0
    offset = 1.0 if stated.get("rescale_offset") else 0.0
    twice = bool(stated.get("include_top")) and "EfficientNet" in str(stated.get("image_processor_type"))
    red, green, blue = ((offset + m) / factor for m in mean)
    # EfficientNet's pixels are divided by the standard deviation twice where it was trained with its classifier.
    wide = [(s**2 if twice else s) / factor for s in std]
    return (red, green, blue), (wide[0], wide[1], wide[2])
