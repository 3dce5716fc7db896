"""A run's whole config, read again from JSON: every part is of the class that is named in it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import cattrs

from fastvlp.config import differences, from_json, to_json, with_defaults
from fastvlp.data.pairs import Data
from fastvlp.errors import UserError
from fastvlp.extensions import variant
from fastvlp.model.encoders.interface import ImageEncoderConfig, TextEncoderConfig
from fastvlp.objectives.objective import ObjectiveConfig
from fastvlp.training.train_config import TrainConfig

# Parts whose class varies, and the package with the classes that need no import by the user.
PACKAGES: Mapping[type, str] = {
    ImageEncoderConfig: "fastvlp.model.encoders",
    TextEncoderConfig: "fastvlp.model.encoders",
    ObjectiveConfig: "fastvlp.objectives",
    Data: "fastvlp.data",
}
_converter = cattrs.Converter()
_converter.register_structure_hook_func(PACKAGES.__contains__, lambda saved, base: _structured(saved, base))


def _structured(saved: Mapping[str, Any], base: type) -> Any:
    return _converter.structure(saved, variant(base, str(saved["type"]), PACKAGES[base]))


def read_config(saved: Mapping[str, Any], source: str) -> TrainConfig:
    """The config that `to_json` wrote. Raises UserError, naming `source`, where this version, or the files that were imported,
    would make another run of it."""
    run = from_json(TrainConfig, saved, source, _converter)
    if changed := differences(with_defaults(dict(saved), run), to_json(run)):
        raise UserError(
            f"{source}: written by another version of fastvlp, which had {', '.join(changed)}; use that version"
        )
    return run
