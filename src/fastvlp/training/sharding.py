"""Runs whose weights, gradients and moments are divided among the ranks (`shard`): PyTorch's FSDP2, `fully_shard`.

The weights of a layer are gathered before it computes, and freed afterwards; weights outside of layers are gathered for the
whole pass. Single numbers, such as a temperature, are whole on each rank (FSDP2 cannot divide them), and the loop averages
their gradients itself.

Only sharded runs import this module, because it takes as long to load as the rest of PyTorch.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from fastvlp import dist
from fastvlp.model.layers import Block
from fastvlp.model.model import VLModel
from fastvlp.training.part_files import Parts
from fastvlp.training.pretraining import Pretraining


class Sharding:
    """The divided weights of a run. All ranks call its methods together, unless a method says otherwise."""

    def __init__(self, pretraining: Pretraining, device: torch.device):
        """Divides the weights among the ranks, in place."""
        # A module with whole weights is saved, because FSDP's modules cannot be copied.
        self._skeleton = skeleton_of(pretraining) if dist.is_main() else None
        # The folder of the last checkpoint's parts, on the main rank.
        self.part_folder: str | None = None
        # A group of ranks for files that are written while the training continues.
        self.saving_group = torch.distributed.new_group(backend="gloo")
        self.divide(pretraining, device)

    @staticmethod
    def divide(pretraining: Pretraining, device: torch.device) -> None:
        """Divides the weights of a module, in place. Two equal modules are divided in the same way."""
        # The warning is about the keys of a cross-attention, which are never changed in place.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)
        options: dict[str, Any] = {
            "mesh": init_device_mesh(device.type, (dist.world(),)),
            "reshard_after_forward": True,
            "ignored_params": {parameter for parameter in pretraining.parameters() if parameter.ndim == 0},
        }
        own_frozen(pretraining)
        for layer in layers(pretraining):
            fully_shard(layer, **options)
        for part in pretraining.modules():
            if isinstance(part, Block) and part.cross is not None:
                register_fsdp_forward_method(part, "keys")
        fully_shard(pretraining, **options)
        for name in ("embedded", "validation"):
            register_fsdp_forward_method(pretraining, name)

    def whole(self, pretraining: Pretraining) -> Pretraining | None:
        """Returns a module with whole weights on the CPU, only on the main rank. The weights are gathered one after the
        other."""
        weights = {name: whole_tensor(x) for name, x in pretraining.state_dict().items()}
        if self._skeleton is None:
            return None
        module = deepcopy(self._skeleton)
        module.load_state_dict(cast(dict[str, Tensor], weights), assign=True)
        return module.train(pretraining.training)

    @staticmethod
    def own_parts(tensors: Mapping[str, Tensor]) -> Parts:
        """Returns copies of the parts that this rank saves. The main rank also saves the tensors that are whole on each
        rank."""
        parts = Parts({}, {})
        for name, x in tensors.items():
            if isinstance(x, DTensor):
                own, begin = x.to_local(), [*x.__create_chunk_list__()[0].offsets]
                is_kept = own.numel() > 0
            else:
                own, begin, is_kept = x, [0] * x.ndim, dist.is_main()
            if is_kept:
                parts.tensors[name] = own.detach().to("cpu", copy=True).contiguous()
                parts.places[name] = begin
        return parts

    def parts_of(self, whole: Mapping[str, Any], own: Mapping[str, Tensor]) -> dict[str, Any]:
        """Returns this rank's parts of whole tensors, divided like those of the same names in `own`. Nothing is sent."""
        return {name: part_of(value, own[name]) if name in own else value for name, value in whole.items()}

    def moments_of(self, saved: Mapping[str, Any], parameters: Sequence[Tensor]) -> dict[str, Any]:
        """Returns the saved state of an optimiser, with moments divided like its `parameters`. Nothing is sent."""
        state = {
            i: {name: x if name == "step" else part_of(x, parameters[i]) for name, x in moments.items()}
            for i, moments in saved["state"].items()
        }
        return {**saved, "state": state}

    def average_whole(self, parameters: Iterable[nn.Parameter]) -> None:
        """Averages the gradients of the parameters that are whole on each rank; FSDP averages only those of the others."""
        whole = [p for p in parameters if not isinstance(p, DTensor)]
        if not whole:
            return
        grads = torch.stack([torch.zeros_like(p) if p.grad is None else p.grad for p in whole])
        has = grads.new_tensor([p.grad is not None for p in whole])
        for p, grad, any_has in zip(whole, *dist.all_reduce_sum(torch.stack([grads, has]))):
            p.grad = grad / dist.world() if any_has else None

    def clip(self, parameters: Sequence[nn.Parameter], most: float) -> Tensor:
        """Scales down the gradients if their norm over all ranks is above `most`, and returns the norm before scaling, []."""
        grads = [p.grad for p in parameters if p.grad is not None]
        cut = dist.own_parts(grad for grad in grads if isinstance(grad, DTensor))
        whole = [grad for grad in grads if not isinstance(grad, DTensor)]
        zero = torch.zeros((), device=parameters[0].device)
        norm = (dist.all_reduce_sum(sum_of_squares(cut, zero)) + sum_of_squares(whole, zero)).sqrt()
        if math.isfinite(most):
            torch._foreach_mul_([*cut, *whole], (most / (norm + 1e-6)).clamp(max=1.0))
        return norm


def layers(pretraining: Pretraining) -> list[nn.Module]:
    """Returns the layers of the model, of its copies, and of public encoders. Each of them is gathered separately."""
    units: dict[int, nn.Module] = {id(part): part for part in pretraining.modules() if isinstance(part, Block)}
    for model in pretraining.modules():
        for encoder in model.encoders().values() if isinstance(model, VLModel) else ():
            parts = (encoder.get_submodule(name) for name in encoder.layer_names().layers)
            units |= {id(part): part for part in parts if next(part.parameters(), None) is not None}
    inner = {id(below) for part in units.values() for below in part.modules() if below is not part}
    return [part for key, part in units.items() if key not in inner]


def own_frozen(pretraining: Pretraining) -> None:
    """If a momentum copy shares frozen parameters with the model, gives each of the two its own, because FSDP allows a
    parameter in only one layer."""
    seen: set[int] = set()
    for layer in layers(pretraining):
        for part in layer.modules():
            for name, p in [*part.named_parameters(recurse=False)]:
                if id(p) in seen and not p.requires_grad:
                    setattr(part, name, nn.Parameter(p.detach().clone(), requires_grad=False))
        seen |= {id(p) for p in layer.parameters()}


def skeleton_of(pretraining: Pretraining) -> Pretraining:
    """Returns the same modules with parameters that have a shape but no values."""
    empty: dict[int, Any] = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad)
        for p in pretraining.parameters()
    }
    return deepcopy(pretraining, empty)


def whole_tensor(x: Tensor) -> Tensor | None:
    """Returns the whole tensor on the CPU of the main rank; the other ranks get nothing."""
    whole = x.full_tensor() if isinstance(x, DTensor) else x
    # This is a copy, because it is written while the training continues.
    return whole.detach().to("cpu", copy=whole is x) if dist.is_main() else None


def part_of(whole: Any, like: Tensor) -> Any:
    """Returns this rank's part of a whole tensor, divided like `like`. A value that is already divided, or is not a tensor of
    that shape, is returned unchanged."""
    if not isinstance(like, DTensor) or not isinstance(whole, Tensor) or isinstance(whole, DTensor):
        return whole
    if whole.shape != like.shape:
        return whole
    return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def sum_of_squares(tensors: Sequence[Tensor], zero: Tensor) -> Tensor:
    """Returns the sum of all squares, []."""
    full = [x for x in tensors if x.numel()]
    return torch.stack(torch._foreach_norm(full)).square().sum() if full else zero
