"""Runs whose weights, gradients and moments are divided among the ranks (`shard`): PyTorch's FSDP2, `fully_shard`.

Each layer is gathered before it computes and freed behind it, what belongs to no layer for the whole pass. Single numbers, such
as a temperature, are whole on each rank (FSDP2 cannot cut them), and the loop averages their gradients itself.

Only runs that are sharded import this module: it takes as long as the rest of PyTorch to load.
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
    """The divided weights of a run. Its methods are for all ranks together, except where they say so."""

    def __init__(self, pretraining: Pretraining, device: torch.device):
        """Divides the weights among the ranks, in place."""
        # What is saved is a module with whole weights. FSDP's cannot be copied.
        self._skeleton = skeleton_of(pretraining) if dist.is_main() else None
        # The folder of the last checkpoint's parts, on the main rank.
        self.part_folder: str | None = None
        # For what is written while the training goes on.
        self.saving_group = torch.distributed.new_group(backend="gloo")
        self.divide(pretraining, device)

    @staticmethod
    def divide(pretraining: Pretraining, device: torch.device) -> None:
        """Divides the weights of a module, in place; those of two alike modules alike."""
        # Of the keys of a cross-attention, which nobody changes in place.
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
        """A module with whole weights on the CPU, on the main rank alone: they are gathered one after the other."""
        weights = {name: whole_tensor(x) for name, x in pretraining.state_dict().items()}
        if self._skeleton is None:
            return None
        module = deepcopy(self._skeleton)
        module.load_state_dict(cast(dict[str, Tensor], weights), assign=True)
        return module.train(pretraining.training)

    @staticmethod
    def own_parts(tensors: Mapping[str, Tensor]) -> Parts:
        """Copies of the parts that this rank saves; the main rank saves what is whole on each."""
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
        """This rank's parts of whole tensors, divided as those of the same names in `own`. Nothing is sent."""
        return {name: part_of(value, own[name]) if name in own else value for name, value in whole.items()}

    def moments_of(self, saved: Mapping[str, Any], parameters: Sequence[Tensor]) -> dict[str, Any]:
        """The saved state of an optimiser, with moments divided as its `parameters` are. Nothing is sent."""
        state = {
            i: {name: x if name == "step" else part_of(x, parameters[i]) for name, x in moments.items()}
            for i, moments in saved["state"].items()
        }
        return {**saved, "state": state}

    def average_whole(self, parameters: Iterable[nn.Parameter]) -> None:
        """Averages the gradients of the parameters that are whole on each rank, as FSDP averages those of the others."""
        whole = [p for p in parameters if not isinstance(p, DTensor)]
        if not whole:
            return
        grads = torch.stack([torch.zeros_like(p) if p.grad is None else p.grad for p in whole])
        has = grads.new_tensor([p.grad is not None for p in whole])
        for p, grad, any_has in zip(whole, *dist.all_reduce_sum(torch.stack([grads, has]))):
            p.grad = grad / dist.world() if any_has else None

    def clip(self, parameters: Sequence[nn.Parameter], most: float) -> Tensor:
        """Scales down gradients that are longer than `most`, and returns their norm before that, [], over all ranks."""
        grads = [p.grad for p in parameters if p.grad is not None]
        cut = dist.own_parts(grad for grad in grads if isinstance(grad, DTensor))
        whole = [grad for grad in grads if not isinstance(grad, DTensor)]
        zero = torch.zeros((), device=parameters[0].device)
        norm = (dist.all_reduce_sum(sum_of_squares(cut, zero)) + sum_of_squares(whole, zero)).sqrt()
        if math.isfinite(most):
            torch._foreach_mul_([*cut, *whole], (most / (norm + 1e-6)).clamp(max=1.0))
        return norm


def layers(pretraining: Pretraining) -> list[nn.Module]:
    """The layers of the model, of its copies, and of encoders from elsewhere: each is gathered by itself."""
    units: dict[int, nn.Module] = {id(part): part for part in pretraining.modules() if isinstance(part, Block)}
    for model in pretraining.modules():
        for encoder in model.encoders().values() if isinstance(model, VLModel) else ():
            parts = (encoder.get_submodule(name) for name in encoder.layer_names().layers)
            units |= {id(part): part for part in parts if next(part.parameters(), None) is not None}
    inner = {id(below) for part in units.values() for below in part.modules() if below is not part}
    return [part for key, part in units.items() if key not in inner]


def own_frozen(pretraining: Pretraining) -> None:
    """Gives each layer frozen parameters of its own, where a momentum copy shares them with the model: FSDP shards a parameter
    with one layer."""
    seen: set[int] = set()
    for layer in layers(pretraining):
        for part in layer.modules():
            for name, p in [*part.named_parameters(recurse=False)]:
                if id(p) in seen and not p.requires_grad:
                    setattr(part, name, nn.Parameter(p.detach().clone(), requires_grad=False))
        seen |= {id(p) for p in layer.parameters()}


def skeleton_of(pretraining: Pretraining) -> Pretraining:
    """The same modules, whose parameters have a shape and no numbers."""
    empty: dict[int, Any] = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad)
        for p in pretraining.parameters()
    }
    return deepcopy(pretraining, empty)


def whole_tensor(x: Tensor) -> Tensor | None:
    """The tensor, whole, on the CPU of the main rank; the others get nothing."""
    whole = x.full_tensor() if isinstance(x, DTensor) else x
    # A copy: it is written while the training goes on.
    return whole.detach().to("cpu", copy=whole is x) if dist.is_main() else None


def part_of(whole: Any, like: Tensor) -> Any:
    """This rank's part of a whole tensor, divided as `like` is. What is divided already, or no tensor of its shape, stays as it
    is."""
    if not isinstance(like, DTensor) or not isinstance(whole, Tensor) or isinstance(whole, DTensor):
        return whole
    if whole.shape != like.shape:
        return whole
    return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def sum_of_squares(tensors: Sequence[Tensor], zero: Tensor) -> Tensor:
    """The sum of all squares, []."""
    full = [x for x in tensors if x.numel()]
    return torch.stack(torch._foreach_norm(full)).square().sum() if full else zero
