"""Runs in the layouts of open_clip and Immich, several formats at once, and the upload to a hub."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fastvlp.cli import main
from fastvlp.errors import UserError
from fastvlp.exporters.export import export
from fastvlp.model.saving import load_model
from tests.exporters.made_runs import CAPTIONS, clip_shaped, made_run, with_one_layer


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return made_run(tmp_path_factory.mktemp("made") / "run", clip_shaped())


def test_open_clip_reads_texts_to_their_end(run: Path, tmp_path: Path):
    assert max(export(run, tmp_path / "out", to="open_clip").differences.values()) <= 1e-5
    settings = json.loads((tmp_path / "out" / "open_clip_config.json").read_text())
    text = settings["model_cfg"]["text_cfg"]
    own = load_model(run)
    # Its default takes the state of the largest id, which no WordPiece has at the end.
    assert text["pool_type"] == "eos" and text["eos_id"] == own.tokenizer.eos and text["context_length"] == 24
    assert settings["preprocess_cfg"]["resize_mode"] == "shortest"
    assert main(["convert", str(tmp_path / "out"), str(tmp_path / "back")]) == 0
    back = load_model(tmp_path / "back")
    ids, length = own.tokenizer.encode(CAPTIONS, 24)
    assert torch.equal(back.tokenizer.encode(CAPTIONS, 24)[0], ids)
    assert torch.equal(back.model.embed_text(ids, length), own.model.embed_text(ids, length))
    assert back.objectives["clip.log_scale"] == 1.5


def test_a_flipped_bit_of_an_export_is_found_on_its_way_back(run: Path, tmp_path: Path, capsys):
    export(run, tmp_path / "out", to="open_clip")
    weights = tmp_path / "out" / "open_clip_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-100] ^= 1
    weights.write_bytes(data)
    assert main(["convert", str(tmp_path / "out"), str(tmp_path / "back")]) == 2
    assert "checksum" in capsys.readouterr().err and not (tmp_path / "back").exists()


@pytest.mark.slow
def test_immich_gives_padded_ids_alone(tmp_path: Path):
    pytest.importorskip("onnxscript")
    run = made_run(tmp_path / "run", with_one_layer(clip_shaped()))
    exported = export(run, tmp_path / "out", to="immich")
    assert max(exported.differences.values()) <= 1e-5
    assert {"textual/model.onnx", "visual/model.onnx", "visual/preprocess_cfg.json"} <= {*exported.files}


def test_several_formats_at_once(run: Path, tmp_path: Path):
    exported = export(run, tmp_path / "out", to=("fastvlp", "open_clip"))
    assert {name.partition("/")[0] for name in exported.files} == {"fastvlp", "open_clip"}
    assert {name.partition(" ")[0] for name in exported.differences} == {"fastvlp", "open_clip"}
    with pytest.raises(UserError, match="no export target"):
        export(run, tmp_path / "other", to=("fastvlp", "open-clip"))
    assert not (tmp_path / "other").exists()
    assert main(["export", str(run), str(tmp_path / "cli"), "--to", "fastvlp", "open_clip"]) == 0
    assert (tmp_path / "cli" / "open_clip" / "open_clip_model.safetensors").is_file()


def test_an_upload_is_private_and_its_failure_keeps_the_folder(run: Path, tmp_path: Path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    calls: list[tuple[str, object]] = []

    class Client:
        def create_repo(self, name, private, exist_ok):
            calls.append((name, private))
            if name == "nobody/there":
                raise OSError("401 Unauthorized")
            return SimpleNamespace(__str__=lambda self: name)

        def upload_folder(self, repo_id, folder_path):
            calls.append((repo_id, sorted(path.name for path in folder_path.iterdir())))

    monkeypatch.setattr(hub, "HfApi", Client)
    assert export(run, tmp_path / "out", push="me/shop").url
    assert calls[0] == ("me/shop", True) and "model.safetensors" in calls[1][1]
    with pytest.raises(UserError, match="hf auth login"):
        export(run, tmp_path / "kept", push="nobody/there")
    assert (tmp_path / "kept" / "model.safetensors").is_file()
