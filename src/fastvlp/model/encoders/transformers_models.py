"""Models of the package `transformers`, built from their config alone and never from a folder or the hub."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from torch import nn

from fastvlp.errors import UserError, install

# Entries of a config.json that say nothing of how the model computes.
UNREAD = (
    "_name_or_path",
    "architectures",
    "auto_map",
    "dtype",
    "id2label",
    "label2id",
    "torch_dtype",
    "transformers_version",
)


def transformers() -> ModuleType:
    """The package. Raises UserError if it is not installed."""
    try:
        import transformers
    except ImportError as error:
        raise UserError(f"this needs the package transformers, which is not installed: {install('towers')}") from error
    return transformers


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Context without the progress bars and warnings of transformers: our own code reports missing and unused tensors."""
    log = transformers().logging
    before = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(before[0])
        if before[1]:
            log.enable_progress_bar()


def model_config(architecture: Mapping[str, Any]) -> Any:
    """The package's own config object of a config.json. Raises UserError for a type that it does not know."""
    name = str(architecture.get("model_type", ""))
    try:
        given = {key: value for key, value in architecture.items() if key != "model_type"}
        return transformers().AutoConfig.for_model(name, **given)
    except (ValueError, KeyError, TypeError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"{name or 'no model_type'}: not a model that transformers {transformers().__version__} builds ({reason})"
        ) from error


def architecture_of(config: Any) -> dict[str, Any]:
    """A config object as the mapping that `build_model` reads."""
    return {key: value for key, value in config.to_dict().items() if key not in UNREAD}


def build_model(architecture: Mapping[str, Any]) -> nn.Module:
    """The model with new weights. Raises UserError if it is of another type than an encoder."""
    config = model_config(architecture)
    try:
        model: nn.Module = transformers().AutoModel.from_config(config)
    except (ValueError, ImportError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"{config.model_type}: not a model that transformers builds as an encoder ({reason})"
        ) from error
    return model
