"""Files beside the weights of a public model: preprocessing, tokenizers, and faults of a folder."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

import pytest
import torch
import transformers as hf
from tokenizers import Tokenizer as RawTokenizer

from fastvlp.convert.preprocessing import Preprocessing, read_preprocessing
from fastvlp.convert.public_encoders import read_images, read_texts, read_tokenizer
from fastvlp.convert.public_folder import open_public
from fastvlp.convert.weight_files import read_weights
from fastvlp.data.records.transform import Transform
from fastvlp.data.tokenize import Tokenizer
from fastvlp.errors import UserError
from tests.towers.public import image_models, save, text_models

DEFAULT = Preprocessing(size=None, fit="crop", mean=(0, 0, 0), std=(1, 1, 1), stated=False)


def stated(folder: Path, processor: object, **changes) -> Preprocessing:
    processor.save_pretrained(folder)  # type: ignore[attr-defined]
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return read_preprocessing(open_public(folder), DEFAULT)


@pytest.mark.parametrize(
    ("processor", "changes", "fit", "size"),
    [
        (hf.CLIPImageProcessorPil, {}, "crop", 224),
        (hf.CLIPImageProcessorPil, {"size": 336, "crop_size": 336}, "crop", 336),
        (hf.SiglipImageProcessorPil, {}, "squash", 224),
        (hf.ViTImageProcessorPil, {"size": 384}, "squash", 384),
        (hf.BitImageProcessorPil, {"size": {"shortest_edge": 256}}, "centre", 224),
        (hf.ConvNextImageProcessorPil, {"size": {"shortest_edge": 224}}, "centre", 224),
        (hf.ConvNextImageProcessorPil, {}, "crop", 384),
        (hf.EfficientNetImageProcessorPil, {}, "squash", 346),
    ],
)
def test_pixels_are_prepared_as_stated(processor, changes, fit, size, tmp_path):
    known = stated(tmp_path, processor(), **changes)
    assert (known.fit, known.size, known.stated) == (fit, size, True)
    # A grey image has the same pixels whatever the resampling.
    for value in (0, 100, 255):
        image = torch.full((3, size, size), value, dtype=torch.uint8)
        theirs = processor.from_pretrained(tmp_path)(image, return_tensors="pt").pixel_values[0]
        mean, std = torch.tensor(known.mean).view(3, 1, 1), torch.tensor(known.std).view(3, 1, 1)
        assert torch.allclose((image / 255 - mean) / std, theirs, atol=1e-5)


@pytest.mark.parametrize(("processor", "edge"), [(hf.CLIPImageProcessorPil, 224), (hf.BitImageProcessorPil, 256)])
def test_the_same_part_of_a_picture_is_seen(processor, edge, tmp_path):
    known = stated(tmp_path, processor(), size={"shortest_edge": edge})
    rows, columns = torch.meshgrid(torch.linspace(0, 255, 300), torch.linspace(0, 255, 400), indexing="ij")
    pixels = torch.stack([rows, columns, rows / 2 + columns / 2], -1).round().to(torch.uint8)
    theirs = processor.from_pretrained(tmp_path)(pixels.permute(2, 0, 1), return_tensors="pt").pixel_values[0]
    ours = Transform(size=known.size, mode=known.fit)(pixels)
    mean, std = torch.tensor(known.mean).view(3, 1, 1), torch.tensor(known.std).view(3, 1, 1)
    assert ((ours / 255 - mean) / std - theirs).abs().max() * 255 * std.max() <= 4


def test_pixels_may_be_scaled_otherwise(tmp_path):
    plain = hf.EfficientNetImageProcessorPil(include_top=False, rescale_offset=True, rescale_factor=1 / 127.5)
    known = stated(tmp_path, plain)
    image = torch.randint(0, 256, (3, 346, 346), dtype=torch.uint8)
    theirs = plain(image, return_tensors="pt").pixel_values[0]
    mean, std = torch.tensor(known.mean).view(3, 1, 1), torch.tensor(known.std).view(3, 1, 1)
    assert torch.allclose((image / 255 - mean) / std, theirs, atol=1e-5)


def test_without_a_statement_the_family_has_its_own(tmp_path):
    assert read_preprocessing(open_public(tmp_path), DEFAULT) is DEFAULT
    (tmp_path / "processor_config.json").write_text(
        json.dumps({"image_processor": {"size": 10, "do_normalize": False}})
    )
    known = read_preprocessing(open_public(tmp_path), DEFAULT)
    assert (known.size, known.mean, known.std) == (10, (0, 0, 0), (1, 1, 1))
    for wrong in ({"size": {"height": 2, "width": 3}}, {"size": 4, "image_mean": "red"}):
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(wrong))
        with pytest.raises(UserError, match=tmp_path.name):
            read_preprocessing(open_public(tmp_path), DEFAULT)


# ---- tokenizers ----

BERT_WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "box", "##es", "中", "文"]


def test_slow_files_are_read_as_transformers_reads_them(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(BERT_WORDS))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    tokenizer = read_tokenizer(open_public(tmp_path))
    ids, length = tokenizer.encode(["A red boxes 中文"], 20)
    assert ids[0].tolist() == hf.AutoTokenizer.from_pretrained(tmp_path)("A red boxes 中文").input_ids
    assert length.tolist() == [8] and tokenizer.added == () and tokenizer.vocab_size == 11
    tokenizer.save(tmp_path / "saved.json")
    assert torch.equal(Tokenizer.load(tmp_path / "saved.json").encode(["A red boxes 中文"], 20)[0], ids)


def test_byte_level_files_are_read_too_and_lacking_tokens_are_added(tmp_path):
    words = ["<s>", "</s>", "<unk>", "a", "b", "ab", "Ġ", "Ġa"]
    (tmp_path / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\nĠ a\n")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "roberta"}))
    tokenizer = read_tokenizer(open_public(tmp_path))
    assert tokenizer.encode(["ab a"], 9)[0][0].tolist() == [0, 5, 7, 1]
    assert len({tokenizer.pad, tokenizer.bos, tokenizer.eos, tokenizer.mask}) == 4


def test_a_tokenizer_file_may_be_named(tmp_path):
    own = Tokenizer.train(["a red box"] * 3, "wordpiece", vocab_size=40)
    own.save(tmp_path / "own.json")
    read = read_tokenizer(open_public(tmp_path), str(tmp_path / "own.json"))
    assert read.vocab_size == own.vocab_size
    with pytest.raises(UserError, match="tokenizer"):
        read_tokenizer(open_public(tmp_path))


# ---- what is wrong ----


def test_what_is_no_weights_file_is_named(tmp_path):
    for name, content in (("bad.safetensors", b"no"), ("bad.bin", b"no")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=name):
            read_weights(tmp_path / name)


def test_what_is_no_public_model_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "file").write_text("")
    run = tmp_path / "run"
    run.mkdir()
    for name in ("model.json", "config.json"):
        (run / name).write_text("{}")
    empty = tmp_path / "empty"
    empty.mkdir()
    cases = {
        str(tmp_path / "absent" / "x"): "no such folder",
        str(tmp_path / "file"): "folder",
        str(run): "run of fastvlp",
        str(empty): r"config\.json",
        "nobody/nothing-of-that-name": "hub",
        "nothing-of-that-name": "hub",
    }
    for source, words in cases.items():
        with pytest.raises(UserError, match=words):
            read_images(source)
    (empty / "config.json").write_text("not json")
    with pytest.raises(UserError, match="damaged"):
        read_texts(str(empty))


def test_another_kind_of_model_is_refused(tmp_path):
    text, image = save(text_models()["bert"], tmp_path / "text"), save(image_models()["resnet"], tmp_path / "image")
    with pytest.raises(UserError, match="bert"):
        read_images(str(text))
    with pytest.raises(UserError, match="resnet"):
        read_texts(str(image))
    pair = json.loads((text / "config.json").read_text())
    for source in ({"model_type": "clap", "text_config": pair}, {"model_type": "t5"}, {"model_type": "unheard_of"}):
        (text / "config.json").write_text(json.dumps(source))
        with pytest.raises(UserError, match=source["model_type"]):
            read_images(str(text))
    with pytest.raises(UserError, match="unheard_of"):
        read_texts(str(text))


def test_missing_weights_are_named(tmp_path):
    folder = save(text_models()["bert"], tmp_path)
    (folder / "model.safetensors").unlink()
    for ours in (True, False):
        with pytest.raises(UserError, match=r"model\.safetensors"):
            read_texts(str(folder), ours=ours).weights()
    (folder / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(UserError, match=r"model\.safetensors"):
        read_texts(str(folder)).weights()


def test_without_transformers_the_extra_is_named_and_ours_still_load(tmp_path, monkeypatch):
    bert, resnet = save(text_models()["bert"], tmp_path / "text"), save(image_models()["resnet"], tmp_path / "image")
    RawTokenizer.from_str(json.dumps(made_bert_tokenizer())).save(str(bert / "tokenizer.json"))
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert read_texts(str(bert)).weights() and read_tokenizer(open_public(bert)).vocab_size == len(BERT_WORDS)
    with pytest.raises(UserError, match="towers"):
        read_images(str(resnet))


def made_bert_tokenizer() -> dict:
    inner = json.loads(Tokenizer.train(["a"], "wordpiece", vocab_size=20)._inner.to_str())
    inner["model"]["vocab"] = {word: i for i, word in enumerate(BERT_WORDS)}
    inner["added_tokens"] = inner["added_tokens"][:5]
    return inner


def test_attempts_to_reach_the_hub_are_one_error_without_warnings(monkeypatch, caplog):
    def download(source, name):
        logging.getLogger("huggingface_hub.utils._http").warning("Retrying in 1s")
        raise ConnectionError("no route to host")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    with pytest.raises(UserError, match="no route to host"):
        read_images("nobody/nothing-of-that-name")
    assert not caplog.records
