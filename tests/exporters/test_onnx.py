"""Runs as ONNX graphs: the same vectors for any number and length of texts, by the exported tokenizer alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch

from fastvlp.cli import main
from fastvlp.errors import UserError
from fastvlp.exporters.export import export
from fastvlp.model.model import ModelConfig
from fastvlp.model.saving import load_model
from fastvlp.model.sizes import brivl_tiny, flip_tiny_published
from tests.convert.public_models import write_model
from tests.exporters.made_runs import CAPTIONS, clip_shaped, made_run, with_one_layer

runtime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


@pytest.mark.slow
@pytest.mark.parametrize(
    "config", [clip_shaped(), flip_tiny_published(size=48), brivl_tiny(size=48, grid=3)], ids=["clip", "flip", "brivl"]
)
def test_graphs_give_the_vectors_of_the_run(config: ModelConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    run = made_run(tmp_path / "run", with_one_layer(config))
    differences = export(run, tmp_path / "out", to="onnx").differences
    assert max(differences.values()) <= 1e-5
    assert not [record for record in caplog.records if "torchvision" in record.getMessage()]
    own = load_model(run)
    tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    session = runtime.InferenceSession(tmp_path / "out" / "text.onnx")
    assert [x.shape for x in session.get_inputs()] == [["batch", "length"]] * 2
    for text in CAPTIONS:
        ids = np.array([tokenizer.encode(text).ids])
        (vector,) = session.run(None, {"input_ids": ids, "attention_mask": np.ones_like(ids)})
        wanted = own.model.embed_text(*own.tokenizer.encode([text], 24))
        assert np.abs(vector - wanted.detach().numpy()).max() < 1e-5
    session = runtime.InferenceSession(tmp_path / "out" / "image.onnx")
    image = torch.randint(0, 256, (5, 3, config.image.size, config.image.size), dtype=torch.uint8)
    (vectors,) = session.run(None, {"pixel_values": own.model.image.normalised(image).numpy()})
    assert np.abs(vectors - own.model.embed_image(own.model.encode_image(image)).detach().numpy()).max() < 1e-5


@pytest.mark.slow
def test_a_model_that_sees_padding_and_reads_no_start(tmp_path: Path):
    public = write_model("siglip", tmp_path / "siglip")
    assert main(["convert", str(public.folder), str(tmp_path / "run")]) == 0
    assert max(export(tmp_path / "run", tmp_path / "out", to="onnx").differences.values()) <= 1e-5


def test_what_has_no_graphs_is_named(tmp_path: Path):
    run = made_run(tmp_path / "boxes", brivl_tiny(size=48))
    with pytest.raises(UserError, match="boxes"):
        export(run, tmp_path / "out", to="onnx")
