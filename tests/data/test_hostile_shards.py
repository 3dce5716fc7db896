"""Tars and indexes that are damaged or made with intent: records are right or left out by name, and nothing is shifted."""

from __future__ import annotations

import io
import random
import shutil
import tarfile
from contextlib import closing

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastvlp.batch import Record
from fastvlp.data.flat_arrays import FlatWriter, open_flat
from fastvlp.data.records.index_files import NAME
from fastvlp.data.records.shards import RecordError, Shards, ShardWriter
from fastvlp.data.records.split_index import read_split_index
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
        shutil.copy2(path, tmp_path)  # with its time: otherwise the index would be of other tars
    assert (tmp_path / NAME).stat().st_ino == index_inode(tmp_path)
    return tmp_path


def index_inode(folder) -> int:
    """Inode of the index of an opened split; it differs from before if the index was made again."""
    Shards(folder)
    return (folder / NAME).stat().st_ino


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


def rewrite(path, edit) -> None:
    """Writes an index again, with right sums, after `edit` has changed its arrays or what they are of."""
    flat = open_flat(path)
    arrays = {name: array.copy() for name, array in flat.arrays.items()}
    about = {name: value for name, value in flat.about.items() if name != "arrays"}
    edit(arrays, about)
    with closing(FlatWriter({name: array.dtype for name, array in arrays.items()}, path.parent)) as writer:
        for name, array in arrays.items():
            writer.add(name, array)
        with path.open("wb") as file:
            writer.save(file.fileno(), about)


def put(name: str, place: int, number: int):
    return lambda arrays, about: arrays[name].__setitem__(place, number)


EDITS = {
    "an offset behind the tar": put("offset", 3, (1 << 32) - 1),
    "a length beyond the tar": put("length", 3, 1 << 30),
    "a length beyond any picture": put("length", 3, (1 << 32) - 1),
    "a kind that is none": put("kind", 0, 9),
    "members that lead backwards": put("first", 2, 1),
    "a first member that is none": put("first", 0, 1),
    "members of the next tar": put("first", 6, 13),
    "keys that lead backwards": put("key", 2, 1),
    "a key behind the keys": put("key", 6, 1 << 20),
    "fewer records": put("tar_records", 1, 5),
    "no record": put("tar_records", 1, 0),
    "a negative number of records": put("tar_records", 1, -1),
    "more members": put("tar_members", 1, 13),
    "more keys": put("tar_keys", 1, 1 << 40),
    "another size of the tar": put("tar_size", 0, 1 << 40),
    "another time of the tar": put("tar_mtime_ns", 0, 1),
    "an array left out": lambda arrays, about: arrays.pop("kind"),
    "an array more": lambda arrays, about: arrays.__setitem__("more", arrays["kind"]),
    "another type": lambda arrays, about: arrays.__setitem__("kind", arrays["kind"].astype("<u2")),
    "an empty array": lambda arrays, about: arrays.__setitem__("tar_records", arrays["tar_records"][:0]),
    "another version": lambda arrays, about: about.__setitem__("version", 4),
    "no names": lambda arrays, about: about.__setitem__("tars", 3),
    "names that are none": lambda arrays, about: about.__setitem__("tars", [3]),
    "names of more tars": lambda arrays, about: about.__setitem__("tars", ["00000.tar", "1.tar"]),
    "damage": lambda arrays, about: about.__setitem__("damage", [[0, {"key": "r0", "reason": "x", "more": 1}]]),
    "damage that is none": lambda arrays, about: about.__setitem__("damage", "x"),
    "a hash that is none": lambda arrays, about: about.__setitem__("content", None),
}


@pytest.mark.parametrize("edit", EDITS)
def test_an_index_with_right_sums_that_is_not_sound_is_made_again(copied, edit):
    rewrite(copied / NAME, EDITS[edit])
    check_equal(copied)
    assert len(read_split_index(copied / NAME)) == 6  # what was made again is kept


def test_an_index_with_right_sums_leads_nowhere_outside_its_tar(copied):
    rewrite(copied / NAME, lambda arrays, about: arrays["offset"].fill(1000))
    assert all(
        data == (copied / "00000.tar").read_bytes()[1000 : 1000 + len(data)] for data in Shards(copied).images(0)
    )


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a": 4, "a": 3}', '{"a": NaN}', "9" * 5000, "nu", "{}", "[]"])
def test_an_index_of_another_form_is_made_again(copied, text):
    (copied / NAME).write_bytes(len(text).to_bytes(8, "little") + text.encode())
    check_equal(copied)


def test_an_index_far_larger_than_its_header_says_is_not_read(copied):
    with (copied / NAME).open("ab") as file:
        file.truncate(1 << 40)
    check_equal(copied)
    (copied / NAME).write_bytes((1 << 60).to_bytes(8, "little") + b"{}")
    check_equal(copied)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_flipped_bit_or_cut_of_an_index_shifts_a_record(copied, split, data):
    path, whole = copied / NAME, (split / NAME).read_bytes()
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
        (tmp_path / NAME).unlink(missing_ok=True)
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
