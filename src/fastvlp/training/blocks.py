"""Options for the layers of a model: compiling them, and computing their states again in the backward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fastvlp.errors import UserError
from fastvlp.model.layers import Block
from fastvlp.model.model import VLModel
from fastvlp.model.recompute import computed_twice

# Largest number of versions of a layer's code: kinds of layers, with and without gradients, and with and without masks.
MOST_VERSIONS = 64


def compile_blocks(module: nn.Module, device: torch.device, *, backend: str = "inductor") -> None:
    """Compiles the layers, which do nearly all the work. One compilation serves all layers of a kind and all numbers of rows
    and tokens. If the whole step were compiled, FLM's random draws would crash the CPU backend of torch 2.13.

    Raises UserError if there is no compiler.
    """
    if backend == "inductor":
        check_compiler(device)
    # With `fullgraph`, dynamo raises an error above its limit.
    config: Any = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, MOST_VERSIONS)
    # Otherwise two sizes that happen to be equal at first, such as the number of tokens and the width of a head, are treated as
    # one.
    torch.fx.experimental._config.use_duck_shape = False
    for part in module.modules():
        if isinstance(part, Block):
            part.compile(dynamic=True, fullgraph=True, backend=backend)


def check_compiler(device: torch.device) -> None:
    """Raises UserError if PyTorch finds nothing that compiles for a device."""
    if device.type != "cpu":
        from torch.utils._triton import has_triton

        if not has_triton():
            raise UserError(
                f"`compile` on {device} needs the package triton, which cannot be used here; leave `compile` out"
            )
        return
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except Exception as error:  # the library's own, which moved between versions
        raise UserError(
            "`compile` on a CPU needs a C++ compiler, and none was found; install g++ (or name one in the variable CXX), or "
            "leave `compile` out"
        ) from error


def compiled() -> tuple[int, float]:
    """Returns the number of graphs that this process has compiled so far, and the seconds that this took."""
    from torch._dynamo.utils import calculate_time_spent, counters

    return counters["stats"]["unique_graphs"], calculate_time_spent().get("total_wall_time", 0.0)


def recompute_blocks(model: VLModel) -> dict[str, int]:
    """Makes the layers keep only their inputs, and compute everything else again in the backward pass. Returns the number of
    such layers for each part of the model. A public encoder counts as 1 if it can do this, and as 0 otherwise."""
    counts: dict[str, int] = {}
    for part in (module for module in model.modules() if isinstance(module, Block)):
        part.recompute = True
    for name, child in model.named_children():
        own = sum(isinstance(module, Block) for module in child.modules())
        if own:
            counts[name] = own
    for name, encoder in model.encoders().items():
        public = encoder.public_module()
        if public is not None:
            counts[name] = int(_recompute_public(public))
    return counts


def _recompute_public(public: nn.Module) -> bool:
    """If the module of another library can compute its layers again, as modules of transformers and timm state, switches this
    on. Returns whether it can."""
    module: Any = public
    if getattr(module, "supports_gradient_checkpointing", False):
        # The older name is deprecated since transformers 5.24.
        enable = getattr(module, "activation_checkpointing_enable", None) or module.gradient_checkpointing_enable
        enable({"use_reentrant": False, "context_fn": computed_twice})
        return True
    if hasattr(module, "set_grad_checkpointing"):
        module.set_grad_checkpointing(True)
        return True
    return False
