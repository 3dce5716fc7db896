"""Tars and indexes that are damaged or made with intent: records are right or left out by name, and nothing is shifted."""

from __future__ import annotations

import io
import json
import random
import tarfile

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastvlp.batch import Record
from fastvlp.data.records.shards import RecordError, Shards, ShardWriter
from fastvlp.data.records.tar_index import TarIndex, scan
from fastvlp.errors import UserError

BLOCK = 512


def content(i: int) -> dict:
    return {"captions": [f"caption {i}"], "number": i}


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards") / "split"
    with ShardWriter(folder) as writer:
        for i in range(6):
            writer.write(Record(key=f"r{i}", images=(b"\xff\xd8" + bytes([i]) * 300,), info=content(i)))
    return folder


@pytest.fixture
def copied(split, tmp_path):
    for path in split.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def check_equal(folder) -> None:
    shards = Shards(folder)
    assert [(r.key, r.info["number"], r.images[0][2]) for r in shards] == [(f"r{i}", i, i) for i in range(6)]
    assert not shards.damage


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    """A header whose size may be impossible: a negative one is written in base 256."""
    member = tarfile.TarInfo(name)
    member.type = kind
    block = bytearray(member.tobuf(tarfile.GNU_FORMAT))
    wide = (b"\xff" if size < 0 else b"\x80") + size.to_bytes(11, "big", signed=True)
    block[124:136] = b"%011o\0" % size if 0 <= size < 8**11 else wide
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % BLOCK)


GOOD = header("a.jpg", 4) + padded(b"\xff\xd8ab") + header("a.txt", 3) + padded(b"cat")
END = bytes(2 * BLOCK)


def read(tmp_path, data: bytes) -> tuple[list[str], Shards]:
    (tmp_path / "00000.tar").write_bytes(data)
    shards = Shards(tmp_path)
    return [record.key for record in shards], shards


EDITS = {
    "offsets moved by a block": lambda index: index["offset"].__setitem__(
        slice(None), [x + BLOCK for x in index["offset"]]
    ),
    "lengths": lambda index: index["length"].__setitem__(0, index["length"][0] + 1),
    "kinds": lambda index: index["kind"].__setitem__(0, 1),
    "counts": lambda index: index["first"].__setitem__(1, 1),
    "keys in another order": lambda index: index["keys"].reverse(),
    "a key left out": lambda index: index["keys"].pop(),
    "a number that is none": lambda index: index["offset"].__setitem__(0, "x"),
    "a number beyond 64 bits": lambda index: index["offset"].__setitem__(0, 1 << 70),
    "a fraction": lambda index: index["offset"].__setitem__(0, index["offset"][0] + 0.5),
    "tables within tables": lambda index: index.__setitem__("offset", [[x] for x in index["offset"]]),
    "no list": lambda index: index.__setitem__("keys", {}),
    "damage": lambda index: index.__setitem__("damage", [{"key": "r0", "reason": "x", "more": 1}]),
    "damage that is none": lambda index: index.__setitem__("damage", "x"),
}


@pytest.mark.parametrize("edit", EDITS)
def test_a_changed_index_is_rebuilt(copied, edit):
    path = copied / "00000.index.json"
    index = json.loads(path.read_text())
    EDITS[edit](index)
    path.write_text(json.dumps(index))
    check_equal(copied)
    assert TarIndex.from_json(path.read_bytes()) is not None  # what was rebuilt is kept


@pytest.mark.parametrize("text", ["[" * 100_000, '{"version": 4, "version": 3}', '{"version": NaN}', "9" * 5000, "nu"])
def test_an_index_of_another_form_is_rebuilt(copied, text):
    (copied / "00000.index.json").write_text(text)
    check_equal(copied)


def test_an_index_far_larger_than_its_tar_is_not_read(copied):
    path = copied / "00000.index.json"
    with path.open("ab") as file:
        file.truncate(1 << 40)
    check_equal(copied)


@pytest.mark.parametrize(
    ("name", "values"),
    [("offset", [1 << 62] * 12), ("length", [-1] * 12), ("kind", [9] * 12), ("first", [0, 5, 4, 6, 8, 10, 12]),
     ("offset", [1000] * 12)],
)  # fmt: skip
def test_an_index_with_a_right_sum_leads_nowhere_outside_its_tar(split, name, values):
    tar = split / "00000.tar"
    with tar.open("rb") as file:
        index = scan(file, str(tar), tar.stat().st_size, 0)
    made = TarIndex(**vars(index) | {name: np.asarray(values, vars(index)[name].dtype)})
    again = TarIndex.from_json(made.to_json())
    assert again is None or ((again.offset >= 0) & (again.offset + again.length <= again.size)).all()
    assert (again is None) == (values != [1000] * 12)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_flipped_bit_or_cut_of_an_index_shifts_a_record(copied, split, data):
    path, whole = copied / "00000.index.json", (split / "00000.index.json").read_bytes()
    changed = bytearray(whole)
    if data.draw(st.booleans()):
        bit = data.draw(st.integers(0, 8 * len(whole) - 1))
        changed[bit // 8] ^= 1 << bit % 8
    else:
        del changed[data.draw(st.integers(0, len(whole) - 1)) :]
    path.write_bytes(changed)
    check_equal(copied)


def test_damaged_bytes_of_a_tar_cost_their_records_alone(split, tmp_path):
    """A changed byte of a picture or text cannot be seen here; those that are whole belong together."""
    images, infos = [record.images[0] for record in Shards(split)], [content(i) for i in range(6)]
    whole, draw = (split / "00000.tar").read_bytes(), random.Random(0)
    for _ in range(60):
        changed = bytearray(whole)
        for _ in range(draw.choice([1, 1, 8])):
            changed[draw.randrange(len(whole) - 2 * BLOCK)] = draw.randrange(256)
        if draw.random() < 0.3:
            del changed[draw.randrange(len(changed)) :]
        (tmp_path / "00000.tar").write_bytes(changed)
        (tmp_path / "00000.index.json").unlink(missing_ok=True)
        try:
            shards = Shards(tmp_path)
        except UserError:
            continue
        for i in range(len(shards)):
            try:
                record = shards.read(i)
            except RecordError:
                continue
            numbers = {images.index(record.images[0])} if record.images[0] in images else set()
            numbers |= {record.info["number"]} if record.info in infos else set()
            assert len(numbers) < 2, "a picture with the text of another"


@pytest.mark.parametrize(
    "first",
    [
        header("b.jpg", -512),
        header("b.jpg", -(1 << 60)),
        header("x", 1 << 40, tarfile.XHDTYPE),
        header("x", 1 << 33, tarfile.GNUTYPE_LONGNAME),
        header("x", -1024, tarfile.XHDTYPE),
        header("b.jpg", 1 << 60),
        header("b.jpg", 1, tarfile.GNUTYPE_SPARSE)[:482] + b"\1" + bytes(29),
    ],
)
def test_members_of_impossible_sizes_end_the_tar(tmp_path, first):
    keys, shards = read(tmp_path, GOOD + header("c.jpg", 4) + padded(b"\xff\xd8cc") + first + END)
    # The record before the damage may lack members.
    assert keys[0] == "a" and "b" not in keys and shards.damage


def test_a_chain_of_extended_headers_ends_the_tar(tmp_path):
    link = header("x", 9, tarfile.XHDTYPE) + padded(b"9 a=bcde\n")
    keys, shards = read(tmp_path, GOOD + header("c.jpg", 4) + padded(b"\xff\xd8cc") + link * 3000 + END)
    assert keys == ["a"] and shards.damage


def test_a_size_among_the_extended_attributes_cannot_lead_backwards(tmp_path):
    text = b"18 size=-00000512\n"
    assert len(text) == 18
    pax = header("x", len(text), tarfile.XHDTYPE) + padded(text)
    keys, shards = read(tmp_path, GOOD + header("c.jpg", 4) + padded(b"\xff\xd8cc") + pax + header("d.jpg", 4) + END)
    assert keys == ["a"] and shards.damage


def test_a_sparse_member_does_not_become_a_picture(tmp_path):
    sparse = bytearray(header("b.jpg", 0, tarfile.GNUTYPE_SPARSE))
    sparse[483:495] = b"%011o\0" % (1 << 32)
    sparse[148:156] = b" " * 8
    sparse[148:156] = b"%06o\0 " % sum(sparse)
    keys, shards = read(
        tmp_path, GOOD + bytes(sparse) + header("b.txt", 3) + padded(b"dog") + GOOD.replace(b"a.", b"c.") + END
    )
    # The changed names have wrong sums.
    assert keys[0] == "a" and "b" not in keys
    assert any(d.key == "b" or "b" in d.reason for d in shards.damage)


def test_a_member_that_comes_twice_begins_a_record_that_is_not_used(tmp_path):
    other = header("a.jpg", 4) + padded(b"\xff\xd8zz") + header("a.txt", 3) + padded(b"dog")
    keys, shards = read(tmp_path, GOOD + other + header("c.jpg", 4) + padded(b"\xff\xd8cc") + END)
    assert keys == ["a", "c"]
    assert shards.read(0).images == (b"\xff\xd8ab",) and shards.info(0)["captions"] == ["cat"]
    assert [d.key for d in shards.damage] == ["a"]


def test_a_member_larger_than_any_picture_is_left_out_without_reading_it(tmp_path):
    path = tmp_path / "00000.tar"
    with path.open("wb") as file:
        file.write(GOOD + header("b.jpg", 1 << 32) + b"\xff\xd8")
        file.seek(len(GOOD) + BLOCK + (1 << 32))
        file.write(header("c.jpg", 4) + padded(b"\xff\xd8cc") + END)
    shards = Shards(tmp_path)
    assert shards.keys == ["a", "c"] and [d.key for d in shards.damage] == ["b"]


def test_names_that_are_no_text_become_keys_that_are(tmp_path):
    names = [b"caf\xe9.jpg", b"two\nlines.jpg", b"\x1b[31m.jpg"]
    blocks = b""
    for name in names:
        block = bytearray(header("n" * len(name), 4))
        block[: len(name)] = name
        block[148:156] = b" " * 8
        block[148:156] = b"%06o\0 " % sum(block)
        blocks += bytes(block) + padded(b"\xff\xd8ab")
    keys, shards = read(tmp_path, blocks + END)
    assert keys == [r"caf\xe9", r"two\x0alines", r"\x1b[31m"]
    assert len(shards.fingerprint) == 64


@pytest.mark.parametrize("text", ["[" * 200 + "]" * 200, '{"a": ' * 150 + "1" + "}" * 150, '{"a": ' + "[" * 100_000])
def test_info_that_is_nested_too_deeply_drops_its_record_by_name(tmp_path, text):
    with tarfile.open(tmp_path / "00000.tar", "w") as tar:
        for name, data in (("a.jpg", b"\xff\xd8"), ("a.json", text.encode())):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    with pytest.raises(RecordError, match="nested"):
        Shards(tmp_path).info(0)
