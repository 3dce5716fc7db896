"""Saves and loads models. A folder has model.json (the config, and how the model was made), tokenizer.json, and safetensors.

A file of weights also has an `info` in its metadata, because the `best` and `last` weights of a run are from different steps.
Each file has a checksum (that of tokenizer.json is in model.json), which is compared when the model is loaded.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import cattrs
import torch
from cattrs.errors import BaseValidationError
from safetensors import SafetensorError
from torch import Tensor, nn

from fastvlp.config import check_numbers
from fastvlp.data.tokenize import Tokenizer
from fastvlp.errors import UserError
from fastvlp.extensions import variant
from fastvlp.files import whole_file, write_whole
from fastvlp.model.encoders.interface import ImageEncoderConfig, TextEncoderConfig
from fastvlp.model.encoders.text_transformer import TextTransformerConfig
from fastvlp.model.encoders.vit import ViTConfig
from fastvlp.model.lora import merged_state
from fastvlp.model.model import ModelConfig, VLModel
from fastvlp.model.outline import check_fits
from fastvlp.plain_json import check_sum, checksum, parse_strict_json, read_strict_json, with_checksum
from fastvlp.tensor_files import not_finite, read_safetensors, read_some, tensor_shapes, write_safetensors

FORMAT = 1
Which = Literal["best", "last"]
OBJECTIVES = "objectives."
# Modules that a model may lack; every model has all other modules.
OPTIONAL = (
    "image.",
    "text.",
    "fusion.",
    "head.",
    "reconstructor.",
    "forward_head.",
    "reverse_head.",
    "embed.image.",
    "embed.text.",
    "single.",
    "single.regions.",
    "single.match.",
)

# Parts whose class varies, and the class of parts that were saved by earlier versions, without the name of the class.
ENCODERS = "fastvlp.model.encoders"
VARYING: dict[type, type] = {ImageEncoderConfig: ViTConfig, TextEncoderConfig: TextTransformerConfig}

_plain = cattrs.Converter(forbid_extra_keys=True)
_converter = cattrs.Converter(forbid_extra_keys=True)
_converter.register_unstructure_hook_func(
    VARYING.__contains__, lambda part: {"type": type(part).__name__, **_plain.unstructure(part)}
)
_converter.register_structure_hook_func(VARYING.__contains__, lambda saved, base: _structured(saved, base))


def _structured(saved: Mapping[str, Any], base: type) -> Any:
    """Returns the config of an encoder, as an instance of the class that it names. Raises UserError if the class is unknown."""
    name = saved.get("type", VARYING[base].__name__)
    return _plain.structure({key: x for key, x in saved.items() if key != "type"}, variant(base, name, ENCODERS))


class Saved(NamedTuple):
    """A loaded model, as `load_model` returns it.

    Attributes:
        model: the model, in evaluation mode on the CPU.
        tokenizer: its tokenizer.
        info: how the model was made, as JSON.
        objectives: saved parameters of objectives, by `<name>.<parameter>`.
        weights: the file that the weights were read from.
    """

    model: VLModel
    tokenizer: Tokenizer
    info: dict[str, Any]
    objectives: dict[str, Tensor]
    weights: Path

    def learned(self, name: str) -> dict[str, Tensor]:
        """Returns the saved parameters of one objective, by name."""
        own = f"{name}."
        return {key.removeprefix(own): x for key, x in self.objectives.items() if key.startswith(own)}


@dataclass(frozen=True, kw_only=True)
class Inheritance:
    """The names of the parameters that a model took over from another model, and of those that it did not.

    Parameters of objectives are called `objectives.<name>.<parameter>`.

    Attributes:
        loaded: parameters that were taken over.
        resized: parameters that were resized and taken over.
        fresh: parameters that are new, because the source lacks the module.
        dropped: parameters of the source that are not used, because the model lacks the module.
    """

    loaded: list[str] = field(default_factory=list)
    resized: list[str] = field(default_factory=list)
    fresh: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)

    def summary(self) -> str:
        """Returns the numbers of parameters as a line of text: `loaded image 199, text 197; resized image.position; new embed
        2`."""
        parts = [
            ("loaded", _counted(self.loaded)),
            ("resized", _few(self.resized)),
            ("new", _counted(self.fresh)),
            ("ignored", _counted(self.dropped)),
        ]
        return "; ".join(f"{what} {names}" for what, names in parts if names)


def save_model(
    folder: str | Path,
    model: VLModel,
    tokenizer: Tokenizer,
    info: Mapping[str, Any],
    *,
    objectives: Mapping[str, Tensor] | None = None,
    name: str = "model",
) -> None:
    """Writes `<name>.safetensors`, model.json and tokenizer.json. Adapters are merged into the weights.

    Args:
        info: how the model was made, as JSON.
        objectives: parameters of objectives to save, by `<name>.<parameter>`.

    Raises:
        UserError: The disk is full, or a number is not finite.
    """
    folder = Path(folder)
    path = folder / f"{name}.safetensors"
    state = merged_state(model) | {OBJECTIVES + key: value for key, value in (objectives or {}).items()}
    tensors = {key: value.detach().cpu().contiguous() for key, value in state.items()}
    _check_finite(model, tensors, path)
    tokenizer.save(folder / "tokenizer.json")
    description = {
        "format": FORMAT,
        "config": _converter.unstructure(model.config),
        "info": dict(info),
        "tokenizer": checksum([(folder / "tokenizer.json").read_bytes()]),
    }
    write_whole(folder / "model.json", json.dumps(with_checksum(description), indent=2).encode())
    with whole_file(path, f"{path.name}.tmp") as part:
        try:
            write_safetensors(part, tensors, {"info": json.dumps(dict(info))})
        except SafetensorError as error:
            raise OSError(None, str(error)) from error


def load_model(folder: str | Path, which: Which = "best") -> Saved:
    """Loads the model of a run, an export, or a converted checkpoint.

    Args:
        folder: Folder of the run, export or converted checkpoint.
        which: `best` for the weights with the lowest validation loss, or `last`. A run without validation has no best weights;
            `best` then reads model.safetensors or the last weights.

    Returns:
        The model in evaluation mode on the CPU, its tokenizer, and more.

    Raises:
        UserError: The folder has no model; a file is damaged or hostile (this is found before it takes more memory or time than
            its size justifies); a weight is not finite; the files were written by a newer version; or the class of an encoder
            is unknown, because its file was not imported.
    """
    folder = Path(folder)
    description = _read_description(folder / "model.json")
    path = _weights_file(folder, which)
    with _damage(path, "copy it again or load another checkpoint"):
        check_fits(description.config, tensor_shapes(path), path)
        tensors, metadata = read_safetensors(path)
        own_info = _object(parse_strict_json(metadata.get("info", "{}")))
    tokenizer_file = folder / "tokenizer.json"
    tokenizer = Tokenizer.load(tokenizer_file)
    if description.tokenizer not in (None, checksum([tokenizer_file.read_bytes()])):
        raise UserError(f"{tokenizer_file}: this tokenizer was not saved with the model; copy the folder again")
    objectives = {key.removeprefix(OBJECTIVES): tensors.pop(key) for key in list(tensors) if key.startswith(OBJECTIVES)}
    model = VLModel(description.config)
    load_exactly(model, tensors, path)
    _check_finite(model, tensors | objectives, path)
    return Saved(model.eval(), tokenizer, description.info | own_info, objectives, path)


def read_objectives(folder: str | Path) -> dict[str, Tensor]:
    """Reads the parameters of objectives that were saved with a model, such as `clip.log_scale`, without the model itself.
    Raises UserError as `load_model` does."""
    path = _weights_file(Path(folder), "best")
    with _damage(path, "copy it again or load another checkpoint"):
        return read_some(path, OBJECTIVES)


def read_config(folder: str | Path) -> ModelConfig:
    """Reads the config of a saved model, without its weights. Raises UserError as `load_model` does."""
    return _read_description(Path(folder) / "model.json").config


def _check_finite(model: VLModel, tensors: Mapping[str, Tensor], source: Path) -> None:
    wrong = not_finite(tensors, {name for name, _ in model.named_buffers()})
    if wrong:
        raise UserError(
            f"{source}: {len(wrong)} tensors hold numbers that are not finite, such as {wrong[0]}: the training diverged; use "
            f"earlier weights, or train with a lower `optim.lr`"
        )


def load_exactly(module: nn.Module, state: Mapping[str, Tensor], source: str | Path) -> None:
    """Loads every parameter from `state`, which must have exactly the same names and shapes. Raises UserError, which names
    `source` and the parameters that do not fit."""
    own = module.state_dict()
    if missing := [name for name in own if name not in state]:
        raise UserError(
            f"{source}: saved from another model, it lacks {_few(missing)}; use the config it was saved with"
        )
    if extra := [name for name in state if name not in own]:
        raise UserError(
            f"{source}: saved from another model, it also has {_few(extra)}; use the config it was saved with"
        )
    for name, value in own.items():
        if not isinstance(state[name], Tensor):
            raise UserError(f"{source}: {name} is a {type(state[name]).__name__} and not a tensor; copy the file again")
        _same_shape(name, state[name], value, source, "use the config it was saved with")
        if state[name].is_floating_point() != value.is_floating_point():
            raise UserError(
                f"{source}: {name} holds {state[name].dtype}, the model has {value.dtype}; copy the file again"
            )
    module.load_state_dict(dict(state))


def inherit(model: VLModel, state: Mapping[str, Tensor], source: str | Path = "saved model") -> Inheritance:
    """Takes over the weights of another model, in place. Returns the names of the parameters that were taken over or not.

    Weights are resized to fit other numbers of positions and token types (`VLModel.resized`). A module in `OPTIONAL` keeps its
    weights if the source lacks it, and is ignored if only the source has it. Raises UserError for any other difference.
    """
    own, result, taken = model.state_dict(), Inheritance(), {}
    fitted = model.resized(state)
    has = {prefix: any(name.startswith(prefix) for name in state) for prefix in OPTIONAL}
    wants = {prefix: any(name.startswith(prefix) for name in own) for prefix in OPTIONAL}
    for name, value in own.items():
        if name in state:
            taken[name] = fitted[name]
            (result.loaded if fitted[name] is state[name] else result.resized).append(name)
            _same_shape(name, taken[name], value, source, "give the new model the same widths")
        elif any(name.startswith(prefix) and not has[prefix] for prefix in OPTIONAL):
            taken[name] = value
            result.fresh.append(name)
        else:
            raise UserError(f"{source}: has no {name}; inherit from a model with the same encoders")
    for name in state:
        if name in own:
            continue
        if not any(name.startswith(prefix) and not wants[prefix] for prefix in OPTIONAL):
            raise UserError(f"{source}: the new model has no place for {name}; give it the same depth and encoders")
        result.dropped.append(name)
    model.load_state_dict(taken)
    return result


@torch.no_grad()
def inherit_objectives(objectives: Mapping[str, nn.Module], state: Mapping[str, Tensor], result: Inheritance) -> None:
    """Takes over the parameters of objectives of the same names, such as a temperature or a head, in place; adds to `result`.

    `state` has keys `<name>.<parameter>`. If it lacks a parameter of an objective, or has it in another shape, the objective
    is not changed.
    """
    for name, objective in objectives.items():
        own = {f"{name}.{key}": p for key, p in objective.named_parameters() if p.requires_grad}
        fits = all(key in state and state[key].shape == p.shape for key, p in own.items())
        for key, parameter in own.items():
            if fits:
                parameter.copy_(state[key])
        (result.loaded if fits else result.fresh).extend(OBJECTIVES + key for key in own)


def _same_shape(name: str, saved: Tensor, own: Tensor, source: str | Path, remedy: str) -> None:
    if saved.shape != own.shape:
        if ("vocabulary" in name or "word" in name) and saved.shape[1:] == own.shape[1:]:
            remedy = "use the tokenizer it was saved with"
        raise UserError(f"{source}: {name} has shape {list(saved.shape)}, the model wants {list(own.shape)}; {remedy}")


def _counted(names: list[str]) -> str:
    """Returns the number of parameters of each part as text. Each objective is a part of its own."""
    parts = Counter(".".join(name.split(".")[: 2 if name.startswith(OBJECTIVES) else 1]) for name in names)
    return ", ".join(f"{part} {count}" for part, count in parts.items())


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


class _Description(NamedTuple):
    """The content of model.json. `tokenizer`: checksum of tokenizer.json; None in files of earlier versions."""

    config: ModelConfig
    info: dict[str, Any]
    tokenizer: str | None


def _read_description(path: Path) -> _Description:
    if not path.is_file():
        raise UserError(
            f"{path.parent}: not the folder of a run or a saved model, it has no {path.name}; check the path"
        )
    with _damage(path, "copy the folder again"):
        written = _object(read_strict_json(path))
        version = int(written["format"])
        if version > FORMAT:
            raise UserError(
                f"{path}: written by a newer fastvlp (format {version}, this one reads {FORMAT}); upgrade fastvlp"
            )
        description = check_sum(written)
        tokenizer, info = description.get("tokenizer"), _object(description["info"])
    try:
        config = _converter.structure(description["config"], ModelConfig)
    # With hostile values, the converters may raise any exception.
    except Exception as error:
        if isinstance(error, UserError):
            raise UserError(f"{path}: {error}") from error
        if isinstance(error, BaseValidationError) and (user_errors := error.subgroup(UserError)) is not None:
            raise UserError(f"{path}: {_first(user_errors)}") from error
        causes = "; ".join(cattrs.transform_error(error))
        raise UserError(f"{path}: this version cannot read the model ({causes}); copy the folder again") from error
    try:
        check_numbers(config, "model")
    except UserError as error:
        raise UserError(f"{path}: {error}; copy the folder again") from None
    return _Description(config, info, tokenizer)


@contextmanager
def _damage(path: Path, remedy: str) -> Iterator[None]:
    """Turns the exceptions that reading a damaged file raises into a UserError."""
    try:
        yield
    except UserError:
        raise
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, ArithmeticError) as error:
        raise UserError(f"{path}: damaged ({error or type(error).__name__}); {remedy}") from error


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"a {type(value).__name__} where an object is expected")
    return value


def _first(group: BaseExceptionGroup) -> BaseException:
    """Returns the first exception within nested groups."""
    inner = group.exceptions[0]
    return _first(inner) if isinstance(inner, BaseExceptionGroup) else inner


def _weights_file(folder: Path, which: Which) -> Path:
    order = {"best": ("best", "model", "last"), "last": ("last", "model")}[which]
    for name in order:
        if (path := folder / f"{name}.safetensors").is_file():
            return path
    raise UserError(f"{folder}: no weights here; it needs one of {', '.join(f'{n}.safetensors' for n in order)}")
