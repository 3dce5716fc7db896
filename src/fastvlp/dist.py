"""Rank, world and the few collectives that training needs; identities on one process. `torchrun` starts several."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.distributed as torch_dist
from torch import Tensor

from fastvlp.errors import UserError

# The number type of matrix products under autocast; weights, optimiser and losses are fp32 in both.
Precision = Literal["fp32", "bf16"]
PrecisionChoice = Literal["auto", "fp32", "bf16"]


def active() -> bool:
    return torch_dist.is_available() and torch_dist.is_initialized()


def rank() -> int:
    return torch_dist.get_rank() if active() else 0


def world() -> int:
    return torch_dist.get_world_size() if active() else 1


def is_main() -> bool:
    return rank() == 0


def local_rank() -> int:
    """Returns the number of this machine's device that this rank uses."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def pick_device(name: str) -> torch.device:
    """auto: this rank's GPU where there is one, else the CPU. Raises UserError for a device that is not here."""
    if name == "auto":
        name = f"cuda:{local_rank()}" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {name!r} cannot be used ({str(error).splitlines()[0]}); choose auto or cpu") from error
    return device


def pick_precision(choice: PrecisionChoice, device: torch.device, trained: Precision = "bf16") -> Precision:
    """Returns the precision that `auto` means on a device: bf16 if the device computes it fast and the model was `trained`
    in it, else fp32."""
    if choice != "auto":
        return choice
    return "bf16" if trained == "bf16" and has_fast_bf16(device) else "fp32"


def has_fast_bf16(device: torch.device) -> bool:
    """Whether bf16 products are faster than fp32 ones: on GPUs that compute them, and on processors with AVX512-BF16 or AMX.
    Elsewhere on a CPU a training step takes two to three times as long."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, lambda: False)() for name in names)


def slow_precision(precision: Precision, device: torch.device) -> str | None:
    """A warning where a device computes slowly in a precision that was chosen; None if it does not."""
    if precision == "fp32" or has_fast_bf16(device):
        return None
    return f"`precision` bf16 is slower than fp32 on this device ({device.type}), up to ten times; choose auto or fp32"


def launched() -> int:
    """Returns the number of processes that `torchrun` started, even before they have joined; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


# Seconds in which the threads of a process group finish.
SETTLE_S = 0.1


@contextmanager
def process_group() -> Iterator[None]:
    """Joins the processes that `torchrun` started, for as long as the block runs; nothing if there is one."""
    if active() or launched() < 2:
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank())
    try:
        # Both, so that a run on the CPU of a machine with GPUs can gather too.
        torch_dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        yield
    except RuntimeError as error:
        cause = explained(error)
        raise cause from cause.__cause__
    finally:
        if active():
            # A thread of gloo may still have to release the tensors of the last collective, for which it needs the GIL. The
            # destructor waits for that thread with the GIL held, when DDP's module is freed: without this pause that hung.
            time.sleep(SETTLE_S)
            torch_dist.destroy_process_group()


# What gloo and NCCL say of a rank that no longer answers.
_LOST_RANK = re.compile(
    r"connection (closed by peer|reset by peer|refused)|broken pipe|remote process exited|socket closed|timed out",
    re.IGNORECASE,
)


def explained(error: Exception) -> Exception:
    """A UserError in place of an error in the communication with a rank that has ended; any other error as it is."""
    lost = _LOST_RANK.search(str(error)) if isinstance(error, RuntimeError) and torch_dist.is_available() else None
    if lost is None or not (
        isinstance(error, torch_dist.DistError) or re.search("gloo|nccl", str(error), re.IGNORECASE)
    ):
        return error
    explained = UserError(
        f"another rank has ended or cannot be reached ({lost[0].lower()}); its output, or the system's log, says why"
    )
    explained.__cause__ = error
    return explained


def own_parts(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Returns this rank's parts of tensors that may be divided among the ranks, without gradients, in the same memory."""
    # DTensor's method; its module takes long to import.
    return [getattr(x.detach(), "to_local", x.detach)() for x in tensors]


def all_reduce_sum(x: Tensor, group: torch_dist.ProcessGroup | None = None) -> Tensor:
    """The sum over ranks, without gradients, in a new tensor. `group`: a thread beside the training needs one of its own, or
    the two would take each other's messages."""
    if not active():
        return x
    x = x.detach().clone()
    torch_dist.all_reduce(x, group=group)
    return x


def gather_objects(value: Any, group: torch_dist.ProcessGroup | None = None) -> list[Any]:
    """Gathers an object from each rank, in rank order, on every rank. It is meant for small objects, which are pickled
    between our own processes."""
    if not active():
        return [value]
    values = [None] * world()
    torch_dist.all_gather_object(values, value, group=group)
    return values


@contextmanager
def together(device: torch.device, group: torch_dist.ProcessGroup | None = None) -> Iterator[None]:
    """Context whose error is raised on every rank, not only on the one that has it, for which the others would wait. The ranks
    must not communicate inside it."""
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        error = caught
    if active() and all_reduce_sum(torch.tensor([error is not None], device=device).float(), group).item():
        messages = gather_objects(None if error is None else str(error), group)
        if error is None:
            rank_, message = next((i, message) for i, message in enumerate(messages) if message is not None)
            raise UserError(f"rank {rank_}: {message}")
    if error is not None:
        raise error


def barrier() -> None:
    if active():
        torch_dist.barrier()


class _Gather(torch.autograd.Function):
    # Not the library's own differentiable all_gather: its name changed between torch 2.11 and 2.13.
    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: list[int]) -> Tensor:
        most = max(sizes)
        padded = torch.cat([x, x.new_zeros(most - len(x), *x.shape[1:])])
        parts = [torch.empty_like(padded) for _ in sizes]
        torch_dist.all_gather(parts, padded.contiguous())
        ctx.sizes = sizes
        return torch.cat([part[:size] for part, size in zip(parts, sizes)])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        grad = grads[0].contiguous().clone()
        torch_dist.all_reduce(grad)
        return grad.split(ctx.sizes)[rank()], None


def gather(x: Tensor) -> tuple[Tensor, int]:
    """Gathers the rows of all ranks, [B ...] -> [M ...], and says where this rank's own begin. Ranks may have different
    numbers of rows, since records are dropped. A row's gradient is summed over the ranks."""
    if not active():
        return x, 0
    own_size = torch.tensor([len(x)], device=x.device)
    all_sizes = [torch.empty_like(own_size) for _ in range(world())]
    torch_dist.all_gather(all_sizes, own_size)
    sizes = [int(size) for size in all_sizes]
    return _Gather.apply(x, sizes), sum(sizes[: rank()])
