"""Files with the weights of public models: where they are, and their tensors."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from fastvlp.errors import UserError, install


def find_file(source: str, name: str) -> Path:
    """The path of a file, which `source` is itself, or which is called `name` in a folder or in a repository of the Hugging
    Face hub (`owner/repository`), from where it is downloaded. Raises UserError where there is none."""
    path = Path(source)
    if path.is_file():
        return path
    if path.is_dir():
        if not (path / name).is_file():
            raise UserError(f"{path}: has no {name}; name the file itself")
        return path / name
    if source.count("/") != 1:
        raise UserError(f"{source}: no such file or folder, and not of the form owner/repository of the hub")
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError
    except ImportError:
        raise UserError(f"{source}: no such file; to fetch it from the hub, {install('hub')}") from None
    try:
        return Path(hf_hub_download(source, name))
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise UserError(f"{source}: the hub did not give {name} ({error}); download it and name the file") from None


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file or of a PyTorch file, by name.

    A PyTorch file is read with weights_only, so that nothing in it is executed. Its tensors may be under `state_dict`
    (open_clip, Lightning) or `learnable` (BriVL), and the `module.` of a parallel wrapper is removed from their names.
    Raises UserError where there is no such file, where it is damaged, or where it holds anything else.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; name a .safetensors file or a PyTorch file")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle fails in any way
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise UserError(
            f"{path}: not readable as weights ({reason}); copy it again, or give a .safetensors file or a state dict"
        ) from error
    if isinstance(state, dict):
        # BriVL's files hold its `learnable` part alone.
        learnable = state.get("learnable")
        state = {f"learnable.{k}": x for k, x in learnable.items()} if isinstance(learnable, dict) else state
        state = state.get("state_dict", state)
    if not isinstance(state, dict) or not all(isinstance(k, str) and isinstance(x, Tensor) for k, x in state.items()):
        raise UserError(f"{path}: holds more than named tensors; give a .safetensors file or a plain state dict")
    wrapped = all(name.startswith("module.") for name in state)
    return {name.removeprefix("module.") if wrapped else name: x for name, x in state.items()}
