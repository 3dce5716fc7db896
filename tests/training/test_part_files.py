"""The files in which the ranks of a sharded run keep tensors: what is read is what was written, and nothing is run."""

from __future__ import annotations

import errno
import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from fastvlp import dist
from fastvlp.errors import UserError, remedy
from fastvlp.tensor_files import file_checksum
from fastvlp.training import part_files
from fastvlp.training.checkpoint import load_checkpoint, save_checkpoint
from fastvlp.training.part_files import FOLDERS, PLACES, Parts, next_folder, remove_parts, write_parts

TENSORS = {
    "pretraining.w": torch.arange(6.0).view(3, 2),
    "pretraining.scale": torch.tensor(2.5),
    "pretraining.flags": torch.tensor([True, False]),
    "pretraining.none": torch.zeros(0, 3),
    "optimiser.11.step": torch.tensor(7.0),
    "optimiser.11.exp_avg": torch.ones(2, 3),
    "ema.n_averaged": torch.tensor(3),
}


def save_as(run: Path, checksums: object, folder: object = FOLDERS[0]) -> None:
    files = {"folder": folder, "checksums": checksums}
    state = {"step": 3, "parts": files, "pretraining": {}, "optimiser": {"param_groups": [5]}, "ema": None}
    save_checkpoint(run / "last.pt", state)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """What a sharded run of two ranks leaves behind, the second of which has the last rows of `w`."""
    w = TENSORS["pretraining.w"]
    own = Parts({**TENSORS, "pretraining.w": w[:2].clone()}, {name: [0] * x.ndim for name, x in TENSORS.items()})
    checksums = write_parts(tmp_path / FOLDERS[0], own)
    with monkeypatch.context() as patch:
        patch.setattr(dist, "rank", lambda: 1)
        last = Parts({"pretraining.w": w[2:].clone()}, {"pretraining.w": [2, 0]})
        checksums |= write_parts(tmp_path / FOLDERS[0], last)
    save_as(tmp_path, checksums)
    return tmp_path


def test_the_tensors_come_back_with_the_checkpoint(run):
    saved = load_checkpoint(run / "last.pt")
    assert saved["step"] == 3 and saved["optimiser"].keys() == {"param_groups", "state"}
    back = {f"pretraining.{name}": x for name, x in saved["pretraining"].items()}
    back |= {f"optimiser.11.{name}": x for name, x in saved["optimiser"]["state"][11].items()}
    back |= {f"ema.{name}": x for name, x in saved["ema"].items()}
    assert back.keys() == TENSORS.keys()
    for name, x in TENSORS.items():
        assert back[name].dtype == x.dtype and torch.equal(back[name], x), name


def test_the_folder_that_the_checkpoint_names_is_not_emptied(run):
    (run / FOLDERS[1]).mkdir()
    (run / FOLDERS[1] / "00003.safetensors.tmp").touch()
    assert next_folder(run, FOLDERS[0]) == FOLDERS[1] and not [*(run / FOLDERS[1]).iterdir()]
    remove_parts(run, keep=FOLDERS[0])
    assert load_checkpoint(run / "last.pt")["step"] == 3 and not (run / FOLDERS[1]).exists()


@pytest.mark.parametrize("how", ["flipped", "cut", "removed"])
def test_damaged_parts_are_refused(run, how):
    path = run / FOLDERS[0] / "00001.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data if how == "flipped" else data[:-8])
    if how == "removed":
        path.unlink()
    with pytest.raises(UserError, match=str(path)):
        load_checkpoint(run / "last.pt")


@pytest.mark.parametrize(("folder", "checksums"), [("..", {}), (FOLDERS[0], {"../a": "crc32:0"}), (3, {}), ("a", None)])
def test_a_checkpoint_that_names_other_files_is_refused(run, folder, checksums):
    save_as(run, checksums, folder)
    with pytest.raises(UserError, match=r"last\.pt"):
        load_checkpoint(run / "last.pt")


def test_parts_that_are_not_the_whole_of_a_tensor_are_refused(run):
    """A hostile file may claim any place for its part; memory is taken for what is there alone."""
    path = run / FOLDERS[0] / "00000.safetensors"
    with safe_open(path, "pt") as file:
        places = json.loads(file.metadata()[PLACES])
    places["pretraining.scale"]["saved_offsets"] = []
    places["pretraining.flags"]["saved_offsets"] = [1 << 40]
    save_file(TENSORS, path, {PLACES: json.dumps(places)})
    save_as(run, {path.name: file_checksum(path)})
    with pytest.raises(UserError, match=r"pretraining\.\w+ is not whole"):
        load_checkpoint(run / "last.pt")


class Program:
    def __reduce__(self):
        return pytest.fail, ("it was run",)


def test_what_dcp_would_unpickle_is_not_read(run):
    (run / FOLDERS[0] / ".metadata").write_bytes(pickle.dumps(Program()))
    assert torch.equal(load_checkpoint(run / "last.pt")["pretraining"]["w"], TENSORS["pretraining.w"])


@pytest.mark.parametrize(
    "error", [RuntimeError("gloo: Connection closed by peer"), torch.OutOfMemoryError("no memory")]
)
@pytest.mark.parametrize("where", ["file_checksum", "read"])
def test_a_lost_rank_or_a_lack_of_memory_is_not_taken_for_damage(run, monkeypatch, where, error):
    def fails(*_):
        raise error

    monkeypatch.setattr(part_files, where, fails)
    with pytest.raises(type(error)) as caught:
        load_checkpoint(run / "last.pt")
    assert caught.value is error


@pytest.mark.parametrize("where", ["file_checksum", "read"])
def test_a_part_that_may_not_be_read_is_reported_with_its_cause(run, monkeypatch, where):
    def fails(*_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(part_files, where, fails)
    with pytest.raises(UserError) as caught:
        load_checkpoint(run / "last.pt")
    assert str(run) in str(caught.value) and str(remedy(caught.value.__cause__)) in str(caught.value)
