"""A model to start from, made of public towers: CLIP's image tower and RoBERTa's first layers under fresh fusion layers."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from fastvlp.convert import flm as convert
from fastvlp.data.tokenize import Tokenizer
from fastvlp.errors import UserError, install
from fastvlp.model.model import ModelConfig, VLModel
from fastvlp.model.saving import save_model
from fastvlp.model.sizes import with_tokenizer


def local_file(source: str, name: str) -> Path:
    """A file as it is, `name` in a folder, or `name` in a repository of the Hugging Face hub (`owner/repository`)."""
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


def load_weights(path: Path) -> dict[str, Tensor]:
    """Tensors of a .safetensors file or of a PyTorch file (read with weights_only: nothing in it is executed), from under
    `state_dict` where it has one (open_clip, Lightning), without the `module.` of a parallel wrapper."""
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


def start_from_towers(config: ModelConfig, clip: Path, roberta: Path, tokenizer: Path, out: Path) -> VLModel:
    """Writes a folder that `--init` reads: the towers of `config` from the two files, everything else fresh (seed 0).

    `clip`: OpenAI's or transformers' layout. The text tower gets RoBERTa's embeddings and as many of its first layers as
    `config` has (arXiv 2303.14038; released code). Positions for another image size are resized when the run starts.
    """
    known = Tokenizer.load(tokenizer)
    towers = convert.from_clip(load_weights(clip), convert.vit(config).depth)
    towers |= convert.from_roberta(load_weights(roberta), config.text.depth)
    torch.manual_seed(0)
    model = VLModel(with_tokenizer(config, known))
    state = model.state_dict()
    for name, value in towers.items():
        if state[name].shape != value.shape:
            raise UserError(
                f"{name} is {tuple(value.shape)} in the file and {tuple(state[name].shape)} in the model: "
                "is the tokenizer the text tower's own, and the size that of these towers?"
            )
    model.load_state_dict(state | towers)
    save_model(out, model, known, {"name": out.name, "reading": "full", "step": 0})
    return model
