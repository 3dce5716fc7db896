"""Files of weights in all the ways in which public models are published: nothing in them is executed."""

from __future__ import annotations

import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch import nn

from fastvlp.convert.weight_files import read_contents, read_weights
from fastvlp.errors import UserError


class Executed:
    """Prints when it is unpickled by a plain pickle."""

    def __reduce__(self):
        return print, ("executed",)


class Scheduler:
    """An object of a trainer, with tensors of its own."""

    def __init__(self):
        self.rates = [torch.zeros(2)]


class Towers(nn.Module):
    def __init__(self):
        super().__init__()
        self.visual = nn.Sequential(nn.Linear(2, 3), nn.GELU(), nn.Linear(3, 3))
        self.position = nn.Parameter(torch.randn(4, 2).T)
        self.scale = nn.Parameter(torch.randn(5).half())
        self.register_buffer("input_resolution", torch.tensor(32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.visual(x)


def equal(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(torch.equal(found[k], x) for k, x in wanted.items())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_torchscript_archive(tmp_path: Path):
    module = Towers()
    torch.jit.script(module).save(tmp_path / "clip.pt")
    assert equal(read_weights(tmp_path / "clip.pt"), module.state_dict())


def test_an_archive_whose_storage_is_shorter_than_its_tensor_is_refused(tmp_path: Path):
    torch.jit.script(Towers()).save(tmp_path / "whole.pt")
    with zipfile.ZipFile(tmp_path / "whole.pt") as whole, zipfile.ZipFile(tmp_path / "short.pt", "w") as short:
        for name in whole.namelist():
            data = whole.read(name)
            short.writestr(name, data[: len(data) // 2] if name.endswith("/data/0") else data)
    with pytest.raises(UserError, match=r"short\.pt"):
        read_weights(tmp_path / "short.pt")


def test_a_checkpoint_with_objects_of_its_trainer(tmp_path: Path, capsys):
    state = Towers().state_dict()
    tied = {**state, "copy": state["position"]}
    whole = {
        "state_dict": OrderedDict(tied),
        "hyper_parameters": {"num_heads": 4, "vit": "ViT-B/32", "loss_names": {"vqa": 1}},
        "callbacks": {Scheduler: {"best": 0.5}},
        "scheduler": Scheduler(),
        "at": Executed(),
    }
    torch.save(whole, tmp_path / "last.ckpt")
    contents = read_contents(tmp_path / "last.ckpt")
    assert equal(contents.tensors, tied)
    assert contents.other["hyper_parameters"] == whole["hyper_parameters"]
    assert "executed" not in capsys.readouterr().out


@pytest.mark.parametrize("place", ["", "state_dict", "model"])
def test_where_the_state_dict_may_be(tmp_path: Path, place: str):
    state = {f"module.{name}": x for name, x in Towers().state_dict().items()}
    torch.save({place: state, "epoch": 3} if place else state, tmp_path / "weights.pth")
    found = read_contents(tmp_path / "weights.pth")
    assert equal(found.tensors, {name.removeprefix("module."): x for name, x in state.items()})
    assert found.other == ({"epoch": 3} if place else {})


def test_what_holds_no_weights_is_named(tmp_path: Path):
    torch.save({"weight": Executed()}, tmp_path / "foreign.pt")
    torch.save([torch.zeros(1)], tmp_path / "list.pt")
    torch.save({"epoch": 1}, tmp_path / "none.pt")
    for name in ("foreign", "list", "none"):
        with pytest.raises(UserError, match=rf"{name}\.pt: .*state dict"):
            read_contents(tmp_path / f"{name}.pt")
    whole = (tmp_path / "none.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.bin").write_text("no")
    for name in ("cut.pt", "text.bin"):
        with pytest.raises(UserError, match=rf"{name}: "):
            read_contents(tmp_path / name)
