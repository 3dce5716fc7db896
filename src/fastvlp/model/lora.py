"""Low-rank adapters (LoRA, arXiv 2106.09685) beside the linear layers of a model, by the package `peft`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fastvlp.errors import UserError, install
from fastvlp.files import whole_file
from fastvlp.model.model import VLModel

# PEFT's own name of the one adapter that there is, and of the model in its files.
ADAPTER, ROOT = "default", "base_model.model."
_OWN = re.compile(r"(^|\.)lora_")


@dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """Adapters that are trained instead of whole parts: two small matrices beside each linear layer, whose product is added to
    the weight of the layer. The weights of the parts are frozen."""

    rank: int = 0
    """Inner width of the two matrices, such as 8; 0: no adapters."""
    alpha: float = 16.0
    """The product of the matrices is multiplied by alpha / rank."""
    dropout: float = 0.0
    """Share of the inputs of the adapters that is set to zero in training."""
    parts: tuple[str, ...] = ("image", "text")
    """Parts of the model that get adapters, such as text, text.blocks.11 or fusion."""
    targets: tuple[str, ...] = ()
    """Linear layers that get an adapter, by the end of their names, such as qkv; by default all in these parts."""

    def __post_init__(self) -> None:
        if self.rank < 0 or self.alpha <= 0 or not 0 <= self.dropout < 1:
            raise UserError(
                f"`lora.rank` {self.rank}, `lora.alpha` {self.alpha}, `lora.dropout` {self.dropout}: give a rank of 1 or more "
                "(0 for no adapters), an alpha above 0 and a dropout from 0 to below 1"
            )


def peft() -> ModuleType:
    """The package. Raises UserError if it is not installed."""
    try:
        import peft
    except ImportError as error:
        raise UserError(f"`lora.rank` takes the package peft: {install('lora')}") from error
    return peft


def add_adapters(model: VLModel, config: LoRAConfig) -> None:
    """Adds adapters to the linear layers of the config's parts, but of those that are frozen, and keeps all else in the parts
    as it is. Raises UserError if there is no such part, or no layer of these names in it."""
    if config.rank == 0:
        return
    names = [name for name, _ in model.named_modules()]
    # A single stream has no image encoder, and takes the default all the same.
    parts = [part for part in config.parts if config.parts != LoRAConfig.parts or part in model.encoders()]
    for part in parts:
        if part not in names:
            raise UserError(
                f"`lora.parts`: the model has no {part}; it has {', '.join(model.encoders())}, fusion and others"
            )
        module = model.get_submodule(part)
        layers = _layers(module, config)
        if not layers:
            ends = ", ".join(config.targets) or "any"
            raise UserError(
                f"`lora.targets`: {part} has no linear layer that is trained with {ends} for the end of its name"
            )
        norms = [name for name, layer in module.named_modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]
        for parameter in module.parameters():
            parameter.requires_grad_(False)
        model.keep_mode(f"{part}.{name}" for name in norms)
        peft().inject_adapter_in_model(peft_config(config, layers), module, ADAPTER)


def _layers(module: nn.Module, config: LoRAConfig) -> list[str]:
    """Plain linear layers: what torch derives from them (in its own attention) is not called, only its weight is read."""
    return [
        name
        for name, layer in module.named_modules()
        if type(layer) is nn.Linear
        and layer.weight.requires_grad
        and (not config.targets or any(f".{name}".endswith(f".{target}") for target in config.targets))
    ]


def peft_config(config: LoRAConfig, layers: list[str], base: str | None = None) -> Any:
    """`base`: what the adapters were trained from."""
    return peft().LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=layers,
        base_model_name_or_path=base,
    )


def adapted_layers(module: nn.Module) -> dict[str, nn.Module]:
    """The layers with an adapter, by name."""
    # Asked of the type: a part that the model lacks raises an error for any name.
    return {name: part for name, part in module.named_modules() if hasattr(type(part), "get_delta_weight")}


def merged_state(module: nn.Module) -> dict[str, Tensor]:
    """The state of the module as if it had no adapters: their products are added to the weights."""
    state = module.state_dict()
    layers = adapted_layers(module)
    if not layers:
        return state
    for name, layer in layers.items():
        key = f"{name}.base_layer.weight" if name else "base_layer.weight"
        with torch.no_grad():
            delta = cast(Any, layer).get_delta_weight(ADAPTER)
        state[key] = (state[key].float() + delta.float()).to(state[key].dtype)
    return {key.replace("base_layer.", ""): x for key, x in state.items() if not _OWN.search(key)}


def save_adapters(folder: Path, model: VLModel, config: LoRAConfig, base: str | None) -> None:
    """Writes the adapters of each part in PEFT's layout, in a folder of the part's name: `PeftModel.from_pretrained` adds them
    to that part of the model in `base`. Nothing is written of a model without adapters."""
    for part in config.parts if config.rank else ():
        module = dict(model.named_modules()).get(part)
        layers = {} if module is None else adapted_layers(module)
        if module is None or not layers:
            continue
        out = folder / part
        out.mkdir(parents=True, exist_ok=True)
        state = {key: x for key, x in module.state_dict().items() if _OWN.search(key)}
        tensors = {ROOT + key.replace(f".{ADAPTER}.", "."): x.detach().cpu().contiguous() for key, x in state.items()}
        with whole_file(out / "adapter_model.safetensors", "adapter_model.tmp") as file:
            save_file(tensors, file, metadata={"format": "pt"})
        peft_config(config, [*layers], base).save_pretrained(str(out))
