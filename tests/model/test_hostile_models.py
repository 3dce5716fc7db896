"""Folders of a model that somebody sends: nothing in them takes memory, time or the program down."""

from __future__ import annotations

import json
import random
import shutil
import struct

import pytest
import torch

from fastvlp.data.tokenize import Tokenizer
from fastvlp.errors import UserError
from fastvlp.model.model import VLModel
from fastvlp.model.saved_run import read_saved_run
from fastvlp.model.saving import load_model, read_config, save_model
from fastvlp.model.sizes import tiny, with_tokenizer
from fastvlp.plain_json import with_checksum
from fastvlp.tensor_files import read_safetensors, write_safetensors


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "model"
    tokenizer = Tokenizer.train(["a red cube", "a blue ball"] * 3, vocab_size=60)
    torch.manual_seed(0)
    save_model(folder, VLModel(with_tokenizer(tiny(), tokenizer)), tokenizer, {"step": 1})
    (folder / "config.json").write_text(json.dumps({"name": "a", "data": {"fit": "crop", "max_length": 20}}))
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "model")


def rewrite(folder, *path, value, checksum=True) -> None:
    """Sets a value within model.json, with a checksum of the whole as somebody would make it who means harm."""
    described = json.loads((folder / "model.json").read_text())
    del described["checksum"]
    place = described
    for name in path[:-1]:
        place = place[name]
    place[path[-1]] = value
    (folder / "model.json").write_text(json.dumps(with_checksum(described) if checksum else described))


def check_refused(folder) -> None:
    with pytest.raises(UserError) as refused:
        load_model(folder)
    assert str(folder) in str(refused.value) and len(str(refused.value)) < 2000


TEXTS = [
    "", "x", "[]", "1", "null", "[" * 100_000, "[" * 200 + "]" * 200, '{"a":' * 5000, '{"format": 1, "format": 1}',
    '{"format": NaN}', '{"format": 1e999}', '{"format": ' + "9" * 5000 + "}", '{"a": "\xe9"}',
]  # fmt: skip


@pytest.mark.parametrize("name", ["model.json", "config.json", "tokenizer.json"])
@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_what_is_no_description_is_refused(folder, name, text):
    (folder / name).write_text(text, encoding="latin1")
    if name == "config.json":
        with pytest.raises(UserError, match=r"config\.json"):
            read_saved_run(folder)
            raise UserError("config.json of other fields is read")  # {"format": ...} states nothing
    else:
        check_refused(folder)


@pytest.mark.parametrize("name", ["model.json", "config.json", "tokenizer.json", "model.safetensors"])
def test_a_file_of_a_terabyte_or_a_pipe_is_not_read(folder, name):
    import os

    read = (lambda folder: read_saved_run(folder)) if name == "config.json" else load_model
    with (folder / name).open("ab") as file:
        file.truncate(1 << 40)
    with pytest.raises(UserError):
        read(folder)
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(UserError):
        read(folder)


HOSTILE = [
    (("config", "image", "depth"), 10**9),
    (("config", "text", "depth"), 10**9),
    (("config", "fusion", "depth"), 10**12),
    (("config", "image", "layer", "width"), 10**9),
    (("config", "image", "layer", "hidden"), 10**12),
    (("config", "image", "layer", "hidden"), 1 << 70),
    (("config", "image", "layer", "heads"), 0),
    (("config", "image", "layer", "heads"), -1),
    (("config", "image", "layer", "heads"), 7),
    (("config", "image", "layer", "eps"), 0),
    (("config", "image", "layer", "eps"), "nan"),
    (("config", "image", "layer", "eps"), "inf"),
    (("config", "image", "layer", "activation"), "exec"),
    (("config", "image", "size"), 10**9),
    (("config", "image", "size"), 0),
    (("config", "image", "patch"), 0),
    (("config", "image", "patch"), -8),
    (("config", "image", "std"), [0, 0, 0]),
    (("config", "image", "mean"), ["a", "b", "c"]),
    (("config", "image", "mean"), [1]),
    (("config", "text", "vocab"), 10**12),
    (("config", "text", "vocab"), -1),
    (("config", "text", "positions"), 10**12),
    (("config", "text", "positions"), -1),
    (("config", "text"), None),
    (("config", "image"), []),
    (("config", "image"), {"type": "ViTConfig"}),
    (("config", "image", "type"), "os.system"),
    (("config", "image", "type"), ["ViTConfig"]),
    (("config", "image", "type"), None),
    (("config",), "x"),
    (("config", "image", "layer"), [[[]]]),
    (("info",), []),
    (("info",), None),
    (("format",), None),
    (("format",), "x"),
    (("format",), 1e400),
    (("tokenizer",), {}),
]


@pytest.mark.parametrize(
    ("path", "value"), HOSTILE, ids=[f"{'.'.join(path)}={value!r}"[:60] for path, value in HOSTILE]
)
def test_a_description_of_an_impossible_model_is_refused_before_it_is_made(folder, path, value):
    rewrite(folder, *path, value=value)
    check_refused(folder)


def header(folder, change) -> None:
    """Changes the header of the weights; `change` takes it as JSON and returns JSON or text."""
    path = folder / "model.safetensors"
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    changed = change(json.loads(data[8 : 8 + length]))
    text = changed if isinstance(changed, bytes) else json.dumps(changed).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def set_in(name, value):
    def change(fields):
        first = next(key for key in fields if key != "__metadata__")
        return fields | {first: fields[first] | {name: value}}

    return change


HEADERS = {
    "depth": lambda fields: b"[" * 100_000,
    "deep": lambda fields: b'{"a":' * 5000,
    "no object": lambda fields: [],
    "empty": lambda fields: {},
    "shape beyond 64 bits": set_in("shape", [1 << 63, 1 << 63]),
    "shape of a terabyte": set_in("shape", [1 << 40]),
    "negative shape": set_in("shape", [-1, -1]),
    "offsets beyond the file": set_in("data_offsets", [0, 1 << 50]),
    "offsets backwards": set_in("data_offsets", [100, 0]),
    "shared offsets": lambda fields: {
        name: one if name == "__metadata__" else one | {"data_offsets": [0, 4]} for name, one in fields.items()
    },
    "type": set_in("dtype", "X9"),
    "integers": set_in("dtype", "I32"),
    "a name twice": lambda fields: json.dumps(fields).encode()[:-1] + b"," + json.dumps(fields).encode()[1:],
    "a tensor left out": lambda fields: dict(list(fields.items())[:-1]),
    "metadata": lambda fields: fields | {"__metadata__": 1},
    "metadata of numbers": lambda fields: fields | {"__metadata__": {"info": 1}},
    "another sum": lambda fields: fields | {"__metadata__": fields["__metadata__"] | {"checksum": "crc32:0"}},
    "another info": lambda fields: fields | {"__metadata__": fields["__metadata__"] | {"info": '{"step": 2}'}},
}  # fmt: skip


@pytest.mark.parametrize("kind", HEADERS)
def test_a_header_of_impossible_tensors_is_refused(folder, kind):
    header(folder, HEADERS[kind])
    check_refused(folder)


@pytest.mark.parametrize("length", [0, 1, 1 << 20, 1 << 40, (1 << 64) - 1])
def test_a_header_of_another_length_is_refused(folder, length):
    path = folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", length) + path.read_bytes()[8:])
    check_refused(folder)


@pytest.mark.parametrize("info", ["[" * 5000, "[]", "NaN", '{"step": NaN}', '{"a": 1, "a": 2}', "", "x"])
def test_info_beside_the_weights_of_another_form_is_refused(folder, info):
    tensors, _ = read_safetensors(folder / "model.safetensors")
    write_safetensors(folder / "model.safetensors", tensors, {"info": info})
    check_refused(folder)


def test_weights_of_another_kind_of_number_are_refused_and_halves_are_read(folder):
    tensors, metadata = read_safetensors(folder / "model.safetensors")
    write_safetensors(folder / "model.safetensors", {name: x.half() for name, x in tensors.items()}, metadata)
    assert load_model(folder).info == {"step": 1}
    write_safetensors(folder / "model.safetensors", {name: x.int() for name, x in tensors.items()}, metadata)
    check_refused(folder)


TOKENIZERS = {
    "an id of billions": lambda spec: spec["model"]["vocab"].update({"x" * 9: 4_000_000_000}),
    "a negative id": lambda spec: spec["model"]["vocab"].update({"x" * 9: -1}),
    "an id twice": lambda spec: spec["model"]["vocab"].update(dict.fromkeys(spec["model"]["vocab"], 1)),
    "no vocabulary": lambda spec: spec["model"].pop("vocab"),
    "another model": lambda spec: spec["model"].update(type="Evil"),
    "added tokens": lambda spec: spec.update(added_tokens=[{"id": 1 << 31, "content": "x"}]),
}  # fmt: skip


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_tokenizer_of_impossible_ids_is_refused(folder, kind):
    spec = json.loads((folder / "tokenizer.json").read_text())
    TOKENIZERS[kind](spec)
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(UserError):
        Tokenizer.load(folder / "tokenizer.json")
        raise UserError("a tokenizer whose ids come twice is read") if kind == "an id twice" else AssertionError
    check_refused(folder)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["model.json", "model.safetensors", "tokenizer.json", "config.json"])
def test_random_damage_is_refused_or_changes_nothing_of_the_model(folder, saved, name):
    whole, draw, expected = (saved / name).read_bytes(), random.Random(name), load_model(saved)
    for _ in range(8):
        data = bytearray(whole)
        for _ in range(draw.choice([1, 4, 64])):
            data[draw.randrange(len(data))] = draw.randrange(256)
        kind = draw.choice(["damaged", "damaged", "cut", "longer"])
        data = data[: draw.randrange(len(data))] if kind == "cut" else data + whole[:99] if kind == "longer" else data
        (folder / name).write_bytes(data)
        try:
            read_saved_run(folder)
            found = load_model(folder)
        except UserError:
            continue
        assert found.model.config == expected.model.config and found.info == expected.info
        assert all(torch.equal(x, found.model.state_dict()[key]) for key, x in expected.model.state_dict().items())


def test_a_config_alone_is_read_and_checked_too(folder):
    read_config(folder)
    rewrite(folder, "config", "image", "layer", "heads", value=0)
    with pytest.raises(UserError):
        read_config(folder)
