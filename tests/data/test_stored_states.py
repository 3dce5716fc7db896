"""Files of stored states: what they hold, when they are computed again, and that an interruption loses nothing."""

from __future__ import annotations

import json
import os
import pickle
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from fastvlp.batch import Record
from fastvlp.data.loader import Row
from fastvlp.data.pairs import PairData
from fastvlp.data.part_file import part_of
from fastvlp.data.reader import RecordReader
from fastvlp.data.records.shards import RecordError, Shards, ShardWriter
from fastvlp.data.records.transform import Transform
from fastvlp.data.state_store import StatesConfig, StateStore
from fastvlp.data.states_file import EntryShape, StatesFile
from fastvlp.data.stored_images import ImageStore
from fastvlp.data.stores import Stored
from fastvlp.data.tokenize import Tokenizer
from fastvlp.errors import UserError
from tests.training.runs import made_pairs, made_records

SIZE, WIDTH = 8, 6
TRANSFORM = Transform(size=SIZE)


class Encoder:
    """Two states of `WIDTH` numbers, which are sums of pixels; counts the images that it encodes."""

    def __init__(self, factor: float = 1.0, fail_after: int | None = None):
        self.factor, self.fail_after, self.images = factor, fail_after, 0

    def __call__(self, image: Tensor) -> Tensor:
        if self.fail_after is not None and self.images >= self.fail_after:
            raise KeyboardInterrupt
        self.images += len(image)
        return self.factor * image.float().reshape(len(image), 2, WIDTH, -1).mean(-1) / 16


def store(encoder: Encoder, name: str = "a", **config) -> ImageStore:
    config = {"store": "always", **config}
    states = StateStore(what="images", about={"encoder": name}, width=WIDTH, config=StatesConfig(**config))
    return ImageStore(store=states, encode=encoder, states=2)


@pytest.fixture
def pairs(tmp_path) -> Path:
    return made_pairs(tmp_path / "pairs")


def expected(shards: Shards, i: int, factor: float = 1.0) -> Tensor:
    image = RecordReader(shards, TRANSFORM).record(i).images[0]
    return factor * image.float().reshape(2, WIDTH, -1).mean(-1) / 16


@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 0.0), ("fp16", 2**-11)])
def test_states_are_those_of_the_encoder(pairs, dtype, tolerance):
    shards, encoder = Shards(pairs / "train"), Encoder()
    states = store(encoder, dtype=dtype).open(shards, TRANSFORM)
    assert encoder.images == len(states) == 24
    for i in range(24):
        assert i in states and states.shape(i) == (16, 16, 1)
        torch.testing.assert_close(states.image(i).float(), expected(shards, i), rtol=tolerance, atol=0)
    # Nothing is computed twice but the first image, which shows whether the encoder is the same.
    again = Encoder()
    states = store(again, dtype=dtype).open(shards, TRANSFORM)
    assert again.images == 1 and len(states) == 24
    assert torch.equal(pickle.loads(pickle.dumps(states)).image(3), states.image(3))


def test_other_tools_read_the_file(pairs):
    states = store(Encoder()).open(Shards(pairs / "train"), TRANSFORM)
    with safe_open(states.path, "pt") as file:
        assert torch.equal(file.get_tensor("states").view(24, 2, WIDTH)[5], states.image(5))
        assert json.loads(file.metadata()["about"])["encoder"] == "a"
        assert file.get_slice("states").get_dtype() == "F16"


def test_records_have_states_in_place_of_pixels(pairs, monkeypatch):
    shards = Shards(pairs / "train")
    states = store(Encoder()).open(shards, TRANSFORM)
    monkeypatch.setattr("fastvlp.data.reader.decoded_with_shapes", None)
    monkeypatch.setattr(Shards, "images", None)
    record = RecordReader(shards, TRANSFORM, cache=True, states=states).record(4)
    assert torch.equal(record.images[0], states.image(4)) and record.shapes == [(16, 16, 1)]


def test_batches_have_states(pairs):
    data = PairData(train=str(pairs / "train"), val=str(pairs / "val"), batch_size=4)
    tokenizer = Tokenizer.train(data.texts(), vocab_size=60)
    rows = data.rows("train", tokenizer, SIZE, strict=False, stored=Stored(images=store(Encoder())))
    plain = data.rows("train", tokenizer, SIZE, strict=False)
    (batch, dropped), (pixels, _) = (made.make([Row(i, i) for i in (3, 1, 7)]) for made in (rows, plain))
    assert (batch.image.shape, batch.image.dtype, dropped) == ((3, 2, WIDTH), torch.float16, [])
    assert torch.equal(batch.ids, pixels.ids) and torch.equal(batch.seed, pixels.seed)


def broken_pairs(folder: Path) -> Path:
    """Record 2 cannot be decoded."""
    records = made_records(6)
    records[2] = Record(key="broken", images=(b"\x89PNG no image",), info={"captions": ["red"]})
    with ShardWriter(folder / "train") as writer:
        for record in records:
            writer.write(record)
    return folder


def test_an_unreadable_image_is_dropped_for_the_same_reason(tmp_path):
    pairs, encoder = broken_pairs(tmp_path / "pairs"), Encoder()
    shards = Shards(pairs / "train")
    states = store(encoder).open(shards, TRANSFORM)
    assert encoder.images == 5 and 2 not in states
    reasons = []
    for stored in (states, None):
        with pytest.raises(RecordError) as raised:
            _ = RecordReader(shards, TRANSFORM, states=stored).record(2).images
        reasons.append(raised.value.dropped)
    assert reasons[0] == reasons[1]


def test_a_record_with_another_number_of_images_stays_an_error(tmp_path):
    """Fine-tuning shares the states of pretraining, which reads the first image of any record."""
    first, second = (record.images[0] for record in made_records(2))
    with ShardWriter(tmp_path / "train") as writer:
        writer.write(Record(key="two", images=(first, second), info={}))
        writer.write(Record(key="one", images=(first,), info={}))
    shards, encoder = Shards(tmp_path / "train"), Encoder()
    single = store(encoder).open(shards, TRANSFORM, 1)
    assert store(Encoder()).open(shards, TRANSFORM).path == single.path
    with pytest.raises(RecordError, match="has 2 images, 1 needed"):
        _ = RecordReader(shards, TRANSFORM, images=1, states=single).record(0).images
    pairs = store(Encoder()).open(shards, TRANSFORM, 2)
    assert pairs.path != single.path and [i in pairs for i in range(4)] == [True, True, False, False]
    reader = RecordReader(shards, TRANSFORM, images=2, states=pairs)
    assert [len(image) for image in reader.record(0).images] == [2, 2]
    with pytest.raises(RecordError, match="has 1 images, 2 needed"):
        _ = reader.record(1).images


def test_whatever_changes_the_states_makes_another_file(pairs):
    shards = Shards(pairs / "train")
    paths = [
        store(Encoder()).open(shards, TRANSFORM).path,
        store(Encoder(2.0), "b").open(shards, TRANSFORM).path,
        store(Encoder(), dtype="fp32").open(shards, TRANSFORM).path,
        store(Encoder()).open(shards, Transform(size=SIZE, mode="squash")).path,
        store(Encoder()).open(shards, Transform(size=SIZE, fill=0)).path,
        store(Encoder()).open(Shards(pairs / "val"), TRANSFORM).path,
    ]
    assert len({*paths}) == len(paths) and {path.parent for path in paths[:-1]} == {pairs / "train"}


def test_changed_shards_make_another_file(pairs):
    """Also where the new images are as long as the old ones."""
    old = store(Encoder()).open(Shards(pairs / "train"), TRANSFORM)
    (tar,) = (pairs / "train").glob("*.tar")
    data = bytearray(tar.read_bytes())
    time.sleep(0.01)
    tar.write_bytes(data)
    assert store(Encoder()).open(Shards(pairs / "train"), TRANSFORM).path != old.path


def test_an_encoder_with_other_code_is_found_out(pairs, capsys):
    """Its config and weights are the same, and so is the file's name."""
    shards, encoder = Shards(pairs / "train"), Encoder(factor=1.5)
    store(Encoder()).open(shards, TRANSFORM)
    states = store(encoder).open(shards, TRANSFORM)
    assert encoder.images == 1 + 24 and "other states now" in capsys.readouterr().err
    torch.testing.assert_close(states.image(2).float(), expected(shards, 2, 1.5), rtol=1e-3, atol=0)


@pytest.mark.parametrize("damage", ["shorter", "longer", "header", "empty"])
def test_a_damaged_file_is_computed_again(pairs, damage, capsys):
    shards, encoder = Shards(pairs / "train"), Encoder()
    path = store(Encoder()).open(shards, TRANSFORM).path
    data = path.read_bytes()
    changed = {"shorter": data[:-1], "longer": data + b"x", "header": data[:20] + b"\xff" + data[21:], "empty": b""}
    path.write_bytes(changed[damage])
    states = store(encoder).open(shards, TRANSFORM)
    assert encoder.images == 24 and str(path) in capsys.readouterr().err
    assert path.read_bytes() == data and 0 in states


def test_a_changed_byte_is_an_error_when_its_entry_is_read(pairs):
    states = store(Encoder()).open(Shards(pairs / "train"), TRANSFORM)
    data = bytearray(states.path.read_bytes())
    data[8 + int.from_bytes(data[:8], "little") + 2 * 2 * WIDTH * 7] ^= 1
    states.path.write_bytes(data)
    states = StatesFile(states.path)
    _ = states.image(6)
    with pytest.raises(UserError, match=rf"{states.path}: damaged, entry 7"):
        _ = states.image(7)


def test_an_interruption_loses_nothing(pairs, monkeypatch):
    monkeypatch.setattr("fastvlp.data.stored_images.ROWS", 5)
    shards, folder = Shards(pairs / "train"), pairs / "train"
    first, second = Encoder(fail_after=10), Encoder()
    with pytest.raises(KeyboardInterrupt):
        store(first).open(shards, TRANSFORM)
    assert not [*folder.glob("states-*.safetensors")]
    (part,) = folder.glob("states-*.part")
    # A power cut may lose bytes of an entry that was written last.
    data = bytearray(part.read_bytes())
    data[8 + int.from_bytes(data[:8], "little") + 2 * 2 * WIDTH * 9] ^= 1
    part.write_bytes(data)
    states = store(second).open(shards, TRANSFORM)
    assert second.images == 24 - 9 and not part.exists()
    for i in range(24):
        torch.testing.assert_close(states.image(i).float(), expected(shards, i), rtol=1e-3, atol=0)


def test_two_processes_do_not_compute_the_same_file(pairs):
    """Each opens the file for itself, so that threads stand for processes."""
    shards, encoder = Shards(pairs / "train"), Encoder()
    together = threading.Barrier(4)

    def opened() -> StatesFile | None:
        own = store(encoder)
        together.wait()
        return own.open(shards, TRANSFORM)

    with ThreadPoolExecutor(4) as pool:
        files = [future.result() for future in [pool.submit(opened) for _ in range(4)]]
    assert len({states.path for states in files}) == 1
    assert encoder.images <= 24 + 3 and not [*(pairs / "train").glob("*.part")]


def test_who_waits_goes_on_where_the_other_was_killed(pairs):
    """The lock ends with its process, and what it computed is used."""
    shards = Shards(pairs / "train")
    path = store(Encoder()).open(shards, TRANSFORM).path
    path.rename(part_of(path))
    child = os.fork()
    if not child:
        import fcntl

        fcntl.flock(os.open(part_of(path), os.O_RDWR), fcntl.LOCK_EX)
        time.sleep(0.5)
        os._exit(0)
    time.sleep(0.2)
    encoder = Encoder()
    states = store(encoder).open(shards, TRANSFORM)
    os.waitpid(child, 0)
    assert encoder.images == 0 and states.path == path


def test_states_beyond_half_precision_are_refused(pairs):
    shards, loud = Shards(pairs / "train"), Encoder(factor=1e5)
    with pytest.raises(UserError, match=r"`states\.dtype` to fp32"):
        store(loud).open(shards, TRANSFORM)
    assert store(loud, dtype="fp32").open(shards, TRANSFORM) is not None
    with pytest.raises(UserError, match="weights may be damaged"):
        store(Encoder(factor=float("nan")), "c").open(shards, TRANSFORM)


def test_without_room_nothing_is_stored(pairs, monkeypatch):
    shards = Shards(pairs / "train")
    monkeypatch.setattr("fastvlp.data.state_store.shutil.disk_usage", lambda _: type("Disk", (), {"free": 800}))
    images = store(Encoder(), store="auto")
    assert images.open(shards, TRANSFORM) is None
    assert "GB left" in str(images.store.notes[0])
    with pytest.raises(UserError, match="cannot be stored: they take"):
        store(Encoder()).open(shards, TRANSFORM)
    assert not [*(pairs / "train").glob("states-*")]


def test_a_full_disk_is_an_error_with_a_remedy(pairs, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fastvlp.data.states_file.reserve", full)
    with pytest.raises(UserError, match="No space left"):
        store(Encoder()).open(Shards(pairs / "train"), TRANSFORM)


def test_what_is_read_once_is_not_stored(pairs):
    shards, encoder = Shards(pairs / "train"), Encoder()
    few = StateStore(what="images", about={}, width=WIDTH, config=StatesConfig(), reads=47)
    assert ImageStore(store=few, encode=encoder, states=2).open(shards, TRANSFORM) is None
    assert encoder.images == 0 and few.notes[0].path is None
    twice = StateStore(what="images", about={}, width=WIDTH, config=StatesConfig(), reads=48)
    assert ImageStore(store=twice, encode=encoder, states=2).open(shards, TRANSFORM) is not None


def test_remote_shards_need_a_folder(pairs, tmp_path):
    import fsspec

    memory = fsspec.filesystem("memory")
    for tar in (pairs / "train").glob("*.tar"):
        memory.pipe(f"/pairs/{tar.name}", tar.read_bytes())
    shards = Shards("memory://pairs")
    with pytest.raises(UserError, match=r"`states\.folder`"):
        store(Encoder()).open(shards, TRANSFORM)
    states = store(Encoder(), folder=str(tmp_path / "states")).open(shards, TRANSFORM)
    assert states.path.parent == tmp_path / "states" and len(states) == 24


def test_time_left_is_reported_where_there_is_no_terminal(pairs, monkeypatch, capsys):
    monkeypatch.setattr("fastvlp.data.state_store.SILENCE_S", 0.0)
    states = store(Encoder())
    states.open(Shards(pairs / "train"), TRANSFORM)
    said = capsys.readouterr().err
    assert "computing the states of 24 images once" in said and "minutes left" in said
    (note,) = states.store.notes
    assert note.entries == 24 and note.seconds > 0 and note.size == note.path.stat().st_size


def test_an_empty_text_has_no_states_and_is_whole(tmp_path):
    """Entries of any length, as texts have."""
    from fastvlp.data.state_store import Computed

    shards = Shards(made_pairs(tmp_path) / "train")
    lengths, generator = [3, 0, 2], torch.Generator().manual_seed(0)
    parts = [torch.randn(n, WIDTH, generator=generator) for n in lengths]

    def compute(entries) -> Iterator[Computed]:
        return (Computed(i, parts[i]) for i in entries)

    texts = StateStore(what="texts", about={}, width=WIDTH, config=StatesConfig(store="always", dtype="fp32"))
    states = texts.open(shards, {}, lambda: EntryShape(lengths, [0, 2, 2, 3]), compute)
    assert np.array_equal(states.lengths(), lengths)
    assert [[*states.of_record(i)] for i in range(3)] == [[0, 1], [], [2]]
    for i, part in enumerate(parts):
        assert torch.equal(states.entry(i), part)
