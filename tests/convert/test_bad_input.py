"""Errors of `vlp convert` for sources that it cannot read: what is wrong, where, and what to do. Nothing is written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
import torch
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors.torch import load_file, save_file
from tokenizers import models

from fastvlp.cli import main
from tests.convert.public_models import write_model


@pytest.fixture(scope="module")
def public(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("public")
    for name in ("clip", "bert"):
        write_model(name, folder / name)
    write_model("clip", folder / "shards", shards="20KB")
    return folder


@pytest.fixture
def copy(public: Path, tmp_path: Path) -> Callable[[str], Path]:
    return lambda name: Path(shutil.copytree(public / name, tmp_path / name))


def refused(source: Path | str, tmp_path: Path, capsys, *options: str) -> str:
    """Returns the message for a source that is not converted."""
    assert main(["convert", str(source), str(tmp_path / "out"), *options]) == 2
    assert not (tmp_path / "out").exists()
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "Traceback" not in error
    return error


def edited(folder: Path, **fields: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_another_kind_of_model(copy, tmp_path: Path, capsys):
    folder = copy("bert")
    for name in ("gpt2", "llama", "no_such_model"):
        edited(folder, model_type=name)
        error = refused(folder, tmp_path, capsys)
        assert f"a {name} of transformers" in error and "--layout" in error and "open_clip" in error
    edited(folder, model_type="vit")
    assert "embeddings.cls_token" in refused(folder, tmp_path, capsys)


def test_a_config_of_other_weights(copy, tmp_path: Path, capsys):
    folder = copy("bert")
    edited(folder, num_hidden_layers=3)
    assert "missing ['encoder.layer.2." in refused(folder, tmp_path, capsys)
    edited(folder, num_hidden_layers=2, hidden_size=24)
    assert "has shape" in refused(folder, tmp_path, capsys)
    edited(folder, hidden_size=48, hidden_act="mish")
    assert main(["convert", str(folder), str(tmp_path / "out")]) == 0, "computed by transformers"


def test_missing_and_damaged_files(copy, tmp_path: Path, capsys):
    folder = copy("clip")
    weights = folder / "model.safetensors"
    state = load_file(weights)
    del state["text_model.final_layer_norm.bias"]
    save_file(state, weights)
    assert "text_model" in (error := refused(folder, tmp_path, capsys)) or "final_layer_norm.bias" in error
    weights.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n")
    assert "git lfs pull" in refused(folder, tmp_path, capsys)
    weights.unlink()
    assert "model.safetensors" in refused(folder, tmp_path, capsys)
    (folder / "config.json").write_text("{")
    assert "config.json: damaged" in refused(folder, tmp_path, capsys)
    (folder / "config.json").unlink()
    assert "no weights" in refused(folder, tmp_path, capsys)
    assert "no such folder" in refused(tmp_path / "absent", tmp_path, capsys)


def test_a_missing_part_of_weights_in_several_files(copy, tmp_path: Path, capsys):
    folder = copy("shards")
    part = sorted(folder.glob("model-*.safetensors"))[1]
    part.unlink()
    assert part.name in refused(folder, tmp_path, capsys)
    (folder / "model.safetensors.index.json").write_text('{"metadata": {}}')
    refused(folder, tmp_path, capsys)


def test_weights_of_transformers_without_their_config(copy, tmp_path: Path, capsys):
    folder = copy("clip")
    (folder / "config.json").unlink()
    for source in (folder, folder / "model.safetensors"):
        assert "--config" in refused(source, tmp_path, capsys)


def test_tokenizers_without_what_the_model_reads(copy, tmp_path: Path, capsys):
    folder = copy("clip")
    words = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]

    def write(vocabulary: list[str]) -> str:
        inner = tokenizers.Tokenizer(models.WordLevel({w: i for i, w in enumerate(vocabulary)}, vocabulary[0]))
        inner.save(str(tmp_path / "words.json"))
        return str(tmp_path / "words.json")

    rows = len(words)
    plain = [f"w{i}" for i in range(rows)]
    for vocabulary, expected in (
        ([*plain[:-1], "<|startoftext|>"], "no eos token"),
        ([*plain[:-1], "<|endoftext|>"], "no bos token"),
        ([*plain[:-3], "<|startoftext|>", "<|endoftext|>"], f"{rows - 1} tokens, and the model knows {rows}"),
        ([*plain, "<|startoftext|>", "<|endoftext|>"], f"{rows + 2} tokens, and the model knows {rows}"),
    ):
        assert expected in refused(folder, tmp_path, capsys, "--tokenizer", write(vocabulary))
    for path in folder.glob("*token*"):
        path.unlink()
    assert "--tokenizer" in refused(folder, tmp_path, capsys)


def test_the_end_must_be_the_largest_token_where_a_text_is_summarised_there(copy, tmp_path: Path, capsys):
    folder = copy("clip")
    config = json.loads((folder / "config.json").read_text())
    size = config["text_config"]["vocab_size"]
    inner = tokenizers.Tokenizer(
        models.WordLevel(
            {w: i for i, w in enumerate(["<|endoftext|>", "<|startoftext|>", *map(str, range(size - 2))])}, "0"
        )
    )
    inner.save(str(folder / "tokenizer.json"))
    # The old rule of transformers, where the config has no id of its own.
    edited(folder, text_config={**config["text_config"], "eos_token_id": 2})
    assert "largest" in refused(folder, tmp_path, capsys)


@pytest.mark.parametrize("error", [LocalEntryNotFoundError, RepositoryNotFoundError, OSError])
def test_without_the_hub_the_way_around_it_is_named(error: type[Exception], tmp_path: Path, capsys, monkeypatch):
    def fail(*args, **kwargs):
        if error is RepositoryNotFoundError:
            import httpx

            raise error("no such repository", response=httpx.Response(404, request=httpx.Request("GET", "https://x")))
        raise error("no connection")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fail)
    said = refused("someone/some-model-that-is-not-there", tmp_path, capsys)
    assert "hf download someone/some-model-that-is-not-there" in said and "folder" in said


def test_two_kinds_in_one_file_are_told_apart_by_name(tmp_path: Path, capsys):
    both = {
        "uniter.embeddings.word_embeddings.weight": torch.zeros(2, 2),
        "img_encoder/embedding/kernel": torch.zeros(2),
    }
    save_file(both, tmp_path / "both.safetensors")
    error = refused(tmp_path / "both.safetensors", tmp_path, capsys)
    assert "uniter" in error and "flip" in error and "--layout" in error
