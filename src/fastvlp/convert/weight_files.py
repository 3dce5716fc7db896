"""Files with the weights of public models: where they are, and what they hold."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from fastvlp.convert.archives import is_torchscript, read_archive
from fastvlp.errors import UserError
from fastvlp.tensor_files import check_torch_file, read_safetensors

# How a file begins that stands for a large one in a repository.
POINTER = b"version https://git-lfs"


class Contents(NamedTuple):
    """The content of a file of weights.

    Attributes:
        tensors: by name.
        other: what else it holds at its top, such as the hyperparameters that Lightning saves.
    """

    tensors: dict[str, Tensor]
    other: dict[str, Any]


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file or of a PyTorch file, by name; raises UserError as `read_contents`."""
    return read_contents(path).tensors


def read_contents(path: Path) -> Contents:
    """Reads a .safetensors file or a PyTorch file.

    Nothing in a PyTorch file is executed. Its tensors may be under `state_dict` (open_clip, Lightning), `model` (MAE, timm) or
    `learnable` (BriVL), and the `module.` of a parallel wrapper is removed from their names. Raises UserError if there is no
    such file, where it is damaged, or where it holds no named tensors.
    """
    check_file(path)
    try:
        if path.suffix == ".safetensors":
            return Contents(read_safetensors(path).tensors, {})
        whole = _load(path)
    except Exception as error:  # a damaged pickle fails in any way
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise UserError(
            f"{path}: not readable as weights ({reason}); copy it again, or give a .safetensors file or a state dict"
        ) from error
    state, other = _state(whole)
    if not state or not _all_tensors(state):
        raise UserError(f"{path}: holds more than named tensors; give a .safetensors file or a plain state dict")
    wrapped = all(name.startswith("module.") for name in state)
    return Contents({name.removeprefix("module.") if wrapped else name: x for name, x in state.items()}, other)


def _load(path: Path) -> Any:
    scripted = is_torchscript(path)
    if zipfile.is_zipfile(path):
        # TorchScript packs its code, and its tensors are compared when they are read.
        check_torch_file(path, scripted=scripted)
    if scripted:
        return read_archive(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError) as error:
        try:
            return read_archive(path)
        except Exception:
            raise error from None


def _state(whole: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state dict within a checkpoint, and the rest of it."""
    if not isinstance(whole, dict):
        return {}, {}
    if _all_tensors(whole):
        return whole, {}
    for name in ("learnable", "state_dict", "model"):
        inner = whole.get(name)
        if isinstance(inner, dict) and _all_tensors(inner):
            # BriVL's files hold its `learnable` part alone.
            prefix = "learnable." if name == "learnable" else ""
            return {prefix + key: x for key, x in inner.items()}, {k: x for k, x in whole.items() if k != name}
    return {}, whole


def _all_tensors(state: Mapping[Any, Any]) -> bool:
    return all(isinstance(name, str) and isinstance(x, Tensor) for name, x in state.items())


def check_file(path: Path) -> None:
    """Raises UserError if there is no such file, or one that stands for another."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; name a .safetensors file or a PyTorch file")
    with path.open("rb") as file:
        if file.read(len(POINTER)) == POINTER:
            raise UserError(f"{path}: a pointer of Git LFS and not the file itself; fetch it with `git lfs pull`")


def tensor_names(path: Path) -> list[str]:
    """Names of the tensors of a .safetensors file, without reading them. Raises UserError if it is damaged."""
    check_file(path)
    try:
        with safe_open(path, "pt") as file:
            return list(file.keys())
    except Exception as error:  # the library raises its own errors and those of the system
        raise UserError(f"{path}: not readable as weights ({error}); copy it again") from error
