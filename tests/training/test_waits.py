"""A step waits for the device where it reads its losses, and where an objective needs a number on the CPU: nowhere else.

On a CPU nothing waits, so that what would wait for a GPU is counted: reading a number, copying one there, and operations whose
results have a size that depends on their input."""

from __future__ import annotations

import traceback
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import fastvlp
from fastvlp.training.loop import start, steps
from tests.training.families import family_run, made_world

aten = torch.ops.aten
READING = {getattr(Tensor, name) for name in ("tolist", "item", "cpu", "numpy", "__bool__", "__int__", "__float__")}
READING |= {Tensor.__index__, Tensor.__array__}
SIZED_BY_DATA = {aten.nonzero, aten.masked_select, aten._unique2, aten.unique_consecutive, aten.bincount, aten.equal}
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_, aten._unsafe_index}
PACKAGE = str(Path(fastvlp.__file__).parent)
OWN = {"note", "__torch_function__", "__torch_dispatch__"}
# Of each kind of run the functions that wait in a step, in their order.
WAITS = {
    "flm_demo": ["places", "places", "steps"],
    "mlm_demo": ["places", "steps"],
    "cappa_demo": ["places", "places", "steps"],
    "flip_demo": ["steps"],
    "brivl_demo": ["steps"],
    "uniter_demo": ["places", "packing", "steps"],
}


class Waits(TorchFunctionMode):
    """Notes the function of the package that calls what would wait for a GPU."""

    def __init__(self):
        super().__init__()
        self.found: list[str] = []

    def note(self) -> None:
        callers = [frame.name for frame in traceback.extract_stack() if frame.filename.startswith(PACKAGE)]
        self.found.append(next(name for name in reversed(callers) if name not in OWN))

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        placed = func in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None
        if func in READING or func is Tensor.new_tensor or placed:
            self.note()
        return func(*args, **kwargs)


class SizedByData(TorchDispatchMode):
    def __init__(self, waits: Waits):
        super().__init__()
        self.waits = waits

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        packet = func.overloadpacket
        masks = [x for x in args[1] if x is not None and x.dtype is torch.bool] if packet in INDEXING else []
        if packet in SIZED_BY_DATA or masks:
            self.waits.note()
        return func(*args, **(kwargs or {}))


@contextmanager
def counted():
    waits = Waits()
    with waits, SizedByData(waits):
        yield waits.found


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return made_world(tmp_path_factory.mktemp("world"))


@pytest.mark.parametrize("name", WAITS)
def test_a_step_waits_only_where_a_number_is_needed(name, world, tmp_path):
    # An average of the weights copies one number a step, by PyTorch's own code.
    run = family_run(name, world, tmp_path, ema=None)
    if name == "brivl_demo":
        run = replace(run, objectives={"moco": replace(run.objectives["moco"], queue=4)})
    running = steps(start(run))
    # The first step counts FLOPs, and the second finds a full queue.
    next(running), next(running)
    with counted() as found:
        next(running)
    running.close()
    assert found == WAITS[name]


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: x[x > 0],
        lambda x: x.new_tensor(3),
        lambda x: bool((x > 0).any()),
        lambda x: torch.tensor(2.0, device=x.device),
        lambda x: (x > 0).nonzero(),
    ],
)
def test_what_waits_is_found(wait, monkeypatch):
    monkeypatch.setattr("tests.training.test_waits.PACKAGE", str(Path(__file__).parent))
    x = torch.ones(3)
    with counted() as found:
        wait(x)
        x.new_full((), 3), x + 1, x[torch.tensor([0, 2])]
    assert Counter(found) == {"<lambda>": 1}
