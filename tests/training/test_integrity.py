"""Weights are read as they were written, and weights that are not finite are not kept."""

from __future__ import annotations

import math
import random
import shutil
import zipfile
from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch

from fastvlp.errors import UserError
from fastvlp.exporters.export import export
from fastvlp.model.saved_run import read_saved_run
from fastvlp.model.saving import load_model
from fastvlp.tensor_files import read_safetensors, write_safetensors
from fastvlp.training.checkpoint import load_checkpoint, save, save_checkpoint
from fastvlp.training.loop import start, steps, train
from tests.training.runs import assert_equal, made_pairs, made_run


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return made_pairs(tmp_path_factory.mktemp("pairs"), 12)


@pytest.fixture(scope="module")
def finished(pairs, tmp_path_factory):
    """A run of two steps of a model with a joint space, and an export of it."""
    folder = tmp_path_factory.mktemp("finished")
    train(made_run(pairs, folder / "run", "clip", steps=2))
    export(folder / "run", folder / "export")
    return folder


def flipped(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def equal(left, right) -> bool:
    if isinstance(left, torch.Tensor):
        return isinstance(right, torch.Tensor) and left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(equal(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(equal, left, right))
    return left == right


def test_no_flipped_bit_of_a_checkpoint_changes_what_is_read(finished, tmp_path):
    whole, path = (finished / "run/last.pt").read_bytes(), tmp_path / "last.pt"
    expected, draw, refused = load_checkpoint(finished / "run/last.pt"), random.Random(0), 0
    for bit in [
        *(draw.randrange(8 * len(whole)) for _ in range(40)),
        *range(8 * (len(whole) - 40), 8 * len(whole), 11),
    ]:
        path.write_bytes(flipped(whole, bit))
        try:
            assert equal(load_checkpoint(path), expected), bit
        except UserError as error:
            assert str(path) in str(error)
            refused += 1
    # What is not refused is padding between the members.
    assert refused > 50


def test_a_cut_or_lengthened_checkpoint_is_refused_or_equal(finished, tmp_path):
    whole, path = (finished / "run/last.pt").read_bytes(), tmp_path / "last.pt"
    for size in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(UserError):
            load_checkpoint(path)


def test_a_checkpoint_whose_tensors_state_other_sizes_is_refused(tmp_path):
    """Torch would read beyond the storage."""
    save_checkpoint(tmp_path / "a.pt", {"w": torch.zeros(1000)})
    with zipfile.ZipFile(tmp_path / "a.pt") as old, zipfile.ZipFile(tmp_path / "b.pt", "w") as new:
        for member in old.infolist():
            data = old.read(member)
            new.writestr(member.filename, data[:400] if member.filename.endswith("data/0") else data)
    with pytest.raises(UserError, match=r"b\.pt"):
        load_checkpoint(tmp_path / "b.pt")


@pytest.mark.parametrize("kind", ["packed", "twice"])
def test_archives_that_unfold_or_repeat_a_member_are_refused(tmp_path, kind):
    save_checkpoint(tmp_path / "a.pt", {"w": torch.zeros(1000)})
    method = zipfile.ZIP_DEFLATED if kind == "packed" else zipfile.ZIP_STORED
    with zipfile.ZipFile(tmp_path / "a.pt") as old, zipfile.ZipFile(tmp_path / "b.pt", "w", method) as new:
        last = [member for member in old.infolist() if member.filename.endswith("data/0")]
        members = old.infolist() + (last if kind == "twice" else [])
        for member in members:
            new.writestr(member.filename, old.read(member))
    with pytest.raises(UserError):
        load_checkpoint(tmp_path / "b.pt")


@pytest.mark.parametrize("file", ["model.json", "model.safetensors", "tokenizer.json"])
def test_no_flipped_bit_of_an_export_changes_the_model(finished, tmp_path, file):
    expected = load_model(finished / "export")
    for other in (finished / "export").iterdir():
        (tmp_path / other.name).write_bytes(other.read_bytes())
    whole, draw, refused = (finished / "export" / file).read_bytes(), random.Random(1), 0
    for _ in range(15):
        (tmp_path / file).write_bytes(flipped(whole, draw.randrange(8 * len(whole))))
        try:
            found = load_model(tmp_path)
        except UserError as error:
            assert str(tmp_path) in str(error)
            refused += 1
            continue
        assert found.model.config == expected.model.config and found.info == expected.info
        assert_equal(found.model.state_dict(), expected.model.state_dict())
        assert found.tokenizer.fingerprint == expected.tokenizer.fingerprint
    assert refused >= 12


def test_a_model_that_is_not_finite_is_neither_saved_nor_loaded_nor_exported(finished, pairs, tmp_path):
    state = start(made_run(pairs, tmp_path / "run", "clip"))
    parameter = next(iter(state.model.parameters()))
    with torch.no_grad():
        parameter.view(-1)[0] = torch.inf
    with pytest.raises(UserError):
        save(state)
    assert not list(tmp_path.glob("run/*.pt")) and not list(tmp_path.glob("run/*.safetensors"))

    shutil.copytree(finished / "run", tmp_path / "broken")
    for path in (tmp_path / "broken").glob("*.safetensors"):
        tensors, metadata = read_safetensors(path)
        next(iter(tensors.values())).view(-1)[-1] = torch.nan
        write_safetensors(path, tensors, metadata)
    for use in (load_model, lambda run: export(run, tmp_path / "export"), lambda run: train_from(pairs, run, tmp_path)):
        with pytest.raises(UserError, match="not finite"):
            use(tmp_path / "broken")
    assert not (tmp_path / "export").exists()


def train_from(pairs, source, folder):
    return train(made_run(pairs, folder / "next", "clip", init=str(source)))


def test_a_run_that_diverges_fails_and_keeps_what_was_saved(pairs, tmp_path, monkeypatch):
    """A step with finite gradients may still blow up the weights; the last step has no successor that would notice."""
    run = made_run(pairs, tmp_path / "run", "clip", steps=4, checkpoint_every=2, validate_every=None)
    run = replace(run, optim=replace(run.optim, lr=1e38, eps=1e-12, warmup=0.0))
    with pytest.raises(UserError):
        train(run)
    assert not (tmp_path / "run/last.pt").exists()
    with pytest.raises(UserError):
        export(tmp_path / "run", tmp_path / "export")


def test_the_steps_of_a_sound_run_are_not_refused(pairs, tmp_path):
    state = start(made_run(pairs, tmp_path / "run", "clip", steps=1))
    assert [report.skipped for report in steps(state)] == [False]


ABSURD = [
    ("optim.lr", math.inf), ("optim.lr", math.nan), ("optim.lr", -1.0), ("optim.eps", 0.0), ("optim.clip", -1.0),
    ("optim.weight_decay", math.inf), ("optim.warmup", 1.0), ("optim.betas", (0.9, 1.0)), ("optim.cross_multiplier", math.nan),
    ("steps", 0), ("steps", -3), ("accumulate", 0), ("keep", 2.0), ("keep", math.nan), ("ema", 1.5), ("vocab", -1),
    ("log_every", 0), ("max_bad_steps", 0), ("threads", 10**9), ("data.batch_size", 0), ("data.batch_size", 10**12),
    ("data.max_length", 1), ("data.workers", -1), ("augment.flip", math.nan), ("objectives.clip.weight", -1.0),
    ("objectives.clip.temperature", math.nan), ("model.image.layer.dropout", 1.0),
]  # fmt: skip


def changed(config, name, value):
    first, _, rest = name.partition(".")
    if isinstance(config, Mapping):
        return {**config, first: changed(config[first], rest, value)}
    return replace(config, **{first: changed(getattr(config, first), rest, value) if rest else value})


@pytest.mark.parametrize(("name", "value"), ABSURD)
def test_absurd_options_are_refused_by_name_before_anything_is_written(pairs, tmp_path, name, value):
    with pytest.raises((UserError, ValueError)) as refused:
        train(changed(made_run(pairs, tmp_path / "run", "clip"), name, value))
    assert f"`{name}`" in str(refused.value) or f"`{name.rpartition('.')[2]}`" in str(refused.value)
    assert not (tmp_path / "run").exists()


CONTENTS = {
    "a step of words": lambda saved: saved.update(step="x"),
    "a negative step": lambda saved: saved.update(step=-1),
    "no time": lambda saved: saved.update(elapsed=math.nan),
    "no run": lambda saved: saved.update(run=[]),
    "no optimiser": lambda saved: saved.update(optimiser=None),
    "another optimiser": lambda saved: saved["optimiser"].update(param_groups=[]),
    "a rate that is not finite": lambda saved: saved["optimiser"]["param_groups"][0].update(base_lr=math.inf),
    "moments of another shape": lambda saved: saved["optimiser"]["state"][0].update(exp_avg=torch.zeros(3)),
    "moments that are not finite": lambda saved: saved["optimiser"]["state"][0]["exp_avg"].fill_(math.nan),
    "weights of another shape": lambda saved: saved["pretraining"].update(
        {next(iter(saved["pretraining"])): torch.zeros(3)}
    ),
    "weights that are no tensors": lambda saved: saved["pretraining"].update({next(iter(saved["pretraining"])): 1}),
    "no weights": lambda saved: saved.update(pretraining=[]),
    "weights of a terabyte that share their bytes": lambda saved: saved["pretraining"].update(
        {next(iter(saved["pretraining"])): torch.zeros(1).expand(1 << 40)}
    ),
    "dropped records of another form": lambda saved: saved.update(dropped=[1]),
    "ranks": lambda saved: saved.update(ranks=None),
}


@pytest.mark.parametrize("kind", CONTENTS)
def test_a_checkpoint_of_other_contents_is_refused(finished, pairs, tmp_path, kind):
    shutil.copytree(finished / "run", tmp_path / "run")
    saved = load_checkpoint(tmp_path / "run/last.pt")
    CONTENTS[kind](saved)
    save_checkpoint(tmp_path / "run/last.pt", saved)
    with pytest.raises(UserError, match=r"last\.pt"):
        start(made_run(pairs, tmp_path / "run", "clip", steps=2), resume=True)


def test_a_changed_config_of_a_run_is_refused(finished, tmp_path):
    shutil.copytree(finished / "run", tmp_path / "run")
    path = tmp_path / "run/config.json"
    path.write_text(path.read_text().replace('"max_length": ', '"max_length": 1'))
    with pytest.raises(UserError, match=r"config\.json: damaged"):
        read_saved_run(tmp_path / "run")
