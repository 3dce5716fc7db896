"""A run of FLIP, trained on half of each image's patches, in the tools that load models of CLIP's shape."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastvlp.cli import main
from fastvlp.exporters.export import export
from fastvlp.model.saving import load_model
from fastvlp.model.sizes import flip_small, flip_tiny, flip_tiny_published
from fastvlp.training.loop import train
from tests.exporters.made_runs import made_run
from tests.training.runs import made_pairs
from tests.training.runs import made_run as short_run


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("flip")
    run = short_run(made_pairs(folder / "pairs"), folder / "run", "clip", steps=2, keep=0.5)
    train(replace(run, model=flip_tiny(size=32), data=replace(run.data, max_length=14)))
    return folder / "run"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "module"),
    [
        ("transformers", "transformers"),
        ("sentence-transformers", "sentence_transformers"),
        ("open_clip", "safetensors"),
    ],
)
def test_a_trained_run_has_the_same_vectors_ids_and_pixels_there(trained: Path, target: str, module: str, tmp_path):
    pytest.importorskip(module)
    differences = export(trained, tmp_path / "out", to=target).differences
    assert differences and max(differences.values()) <= 1e-5


def test_the_way_to_transformers_and_back_is_the_identity(trained: Path, tmp_path: Path):
    pytest.importorskip("transformers")
    export(trained, tmp_path / "out", to="transformers")
    assert main(["convert", str(tmp_path / "out"), str(tmp_path / "back")]) == 0
    one, two = load_model(trained), load_model(tmp_path / "back")
    image = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    ids, length = one.tokenizer.encode(["red blue green", "two"], 14)
    encode = lambda saved: saved.model.embed_image(saved.model.encode_image(image))  # noqa: E731
    assert torch.equal(encode(one), encode(two))
    assert torch.equal(one.model.embed_text(ids, length), two.model.embed_text(ids, length))


@pytest.mark.slow
def test_the_small_size_fits_too(tmp_path: Path):
    pytest.importorskip("transformers")
    differences = export(made_run(tmp_path / "run", flip_small()), tmp_path / "out", to="transformers").differences
    assert max(differences.values()) <= 1e-5


def test_a_saved_run_of_the_published_shape_still_loads(tmp_path: Path):
    """Models that were saved before there was a field for where positions begin."""
    made_run(tmp_path, flip_tiny_published())
    model = load_model(tmp_path).model
    described = json.loads((tmp_path / "model.json").read_text())
    del described["checksum"], described["config"]["image"]["position_start"]
    (tmp_path / "model.json").write_text(json.dumps(described))
    saved = load_model(tmp_path).model
    assert saved.config == model.config
    assert all(torch.equal(x, saved.state_dict()[name]) for name, x in model.state_dict().items())
