"""Files that somebody sends: nothing in them takes memory, time or the program down, and what is wrong is named."""

from __future__ import annotations

import gzip
import io
import json
import math
import os
import tarfile
import zipfile

import numpy as np
import pytest
from PIL import Image

from fastvlp.batch import Dropped, Record
from fastvlp.data.records import tar_members
from fastvlp.data.records.detections import Detections, pack, read_npz, unpack
from fastvlp.data.sources import find_format, make_source, source_files
from fastvlp.errors import UserError
from tests.data.test_hostile_shards import END, header, padded


def picture() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(file, "PNG")
    return file.getvalue()


def read(path, format="auto") -> tuple[list[str], list[str]]:
    """Keys of the records, and of what was dropped."""
    items = list(make_source(find_format(path, format), {}).read(path))
    records = [item.key for item in items if isinstance(item, Record)]
    return records, [item.key for item in items if isinstance(item, Dropped)]


def row(folder, name: str) -> str:
    """A line about a picture, which is made."""
    (folder / f"{name}.png").write_bytes(picture())
    return json.dumps({"image": f"{name}.png", "caption": "a cat"})


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


DEEP = [101, 500, 5000, 100_000]


@pytest.mark.parametrize("depth", DEEP)
def test_a_deep_line_is_dropped_by_its_number(tmp_path, depth):
    lines = [row(tmp_path, "a"), '{"image": "b.png", "caption": ' + nested(depth) + "}", row(tmp_path, "c")]
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    assert read(tmp_path / "pairs.jsonl") == (["a", "c"], ["pairs.jsonl:2"])


@pytest.mark.parametrize("depth", DEEP)
def test_deep_json_beside_a_picture_or_in_a_tar_drops_that_record(tmp_path, depth):
    (tmp_path / "folder").mkdir()
    for name, text in (("a", '{"caption": "a cat"}'), ("b", '{"x": ' + nested(depth) + "}")):
        (tmp_path / f"folder/{name}.png").write_bytes(picture())
        (tmp_path / f"folder/{name}.json").write_text(text)
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        for file in sorted((tmp_path / "folder").iterdir()):
            tar.add(file, file.name)
    assert read(tmp_path / "folder", "folder") == (["a"], ["b"])
    assert read(tmp_path / "t.tar") == (["a"], ["b"])


@pytest.mark.parametrize("depth", DEEP)
def test_a_deep_file_is_refused(tmp_path, depth):
    (tmp_path / "a.json").write_text(nested(depth))
    with pytest.raises(UserError):
        read(tmp_path / "a.json")


def test_a_line_too_long_to_be_read_is_dropped_and_the_next_one_read(tmp_path, monkeypatch):
    monkeypatch.setattr(source_files, "MOST_LINE", 100)
    lines = [row(tmp_path, "a"), json.dumps({"image": "x" * 950}), row(tmp_path, "c")]
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    assert read(tmp_path / "pairs.jsonl") == (["a", "c"], ["pairs.jsonl:2"])


def test_pipes_and_huge_files_among_pictures_are_dropped_without_reading(tmp_path):
    (tmp_path / "a.png").write_bytes(picture())
    os.mkfifo(tmp_path / "b.png")
    with (tmp_path / "c.png").open("wb") as file:
        file.truncate(1 << 42)
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text("a cat")
    assert read(tmp_path) == (["a"], ["b", "c"])
    for name in "abc":
        (tmp_path / f"{name}.txt").unlink()
    (tmp_path / "pairs.csv").write_text("image,caption\na.png,x\nb.png,y\nc.png,z\n")
    records, dropped = read(tmp_path / "pairs.csv")
    assert len(records) == 1 and len(dropped) == 2


def examples(tmp_path, write) -> tuple[list[str], list[str]]:
    rows = [{"image": key, "file": f"{key}.png", "captions": ["a cat"]} for key in ("a", "b", "c")]
    (tmp_path / "examples.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with zipfile.ZipFile(tmp_path / "images.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.png", picture())
        archive.writestr("c.png", picture())
        write(archive)
    return read(tmp_path)


def test_a_member_of_a_zip_that_unfolds_to_gigabytes_is_dropped_without_reading(tmp_path):
    def bomb(archive):
        info = zipfile.ZipInfo("b.png")
        info.compress_type = zipfile.ZIP_DEFLATED
        archive.writestr(info, bytes(1000))
        info.file_size = 1 << 34

    assert examples(tmp_path, bomb) == (["a", "c"], ["b"])


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_member_of_a_zip_that_is_there_twice_is_dropped(tmp_path):
    def twice(archive):
        archive.writestr("b.png", picture())
        archive.writestr("b.png", b"another")

    assert examples(tmp_path, twice) == (["a", "c"], ["b"])


def test_a_member_of_a_zip_with_a_wrong_sum_is_dropped(tmp_path):
    def wrong(archive):
        archive.writestr("b.png", picture(), zipfile.ZIP_STORED)
        archive.getinfo("b.png").CRC ^= 1

    assert examples(tmp_path, wrong) == (["a", "c"], ["b"])


@pytest.mark.parametrize("cut", [0, 4, 30, -1, -20])
def test_a_cut_zip_is_refused_or_read(tmp_path, cut):
    examples(tmp_path, lambda archive: archive.writestr("b.png", picture()))
    whole = (tmp_path / "images.zip").read_bytes()
    (tmp_path / "images.zip").write_bytes(whole[:cut])
    with pytest.raises(UserError):
        read(tmp_path)


GOOD = header("a.png", len(picture())) + padded(picture()) + header("a.txt", 3) + padded(b"cat")


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    "bad",
    [
        header("b.png", 1 << 40),
        header("b.png", 1 << 62),
        header("b.png", -512),
        header("b", 1 << 40, tarfile.XHDTYPE),
        header("b", -512, tarfile.GNUTYPE_LONGNAME),
        header("b.png", 1, tarfile.GNUTYPE_SPARSE)[:482] + b"\1" + bytes(29),
        (header("x", 9, tarfile.XHDTYPE) + padded(b"9 a=bcde\n")) * 3000,
    ],
)
def test_a_tar_with_impossible_members_gives_the_records_before_them(tmp_path, packed, bad):
    data = GOOD + header("z.txt", 3) + padded(b"dog") + bad + END
    path = tmp_path / ("t.tar.gz" if packed else "t.tar")
    path.write_bytes(gzip.compress(data) if packed else data)
    records, dropped = read(path)
    assert records == ["a"] and dropped


def test_a_packed_tar_does_not_unfold_into_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(tar_members, "MOST_BYTES", 1 << 20)
    path = tmp_path / "t.tar.gz"
    with gzip.open(path, "wb", 1) as file:
        file.write(GOOD + header("b.png", 1 << 24) + bytes(1 << 24))
        file.write(header("c.png", len(picture())) + padded(picture()) + header("c.txt", 3) + padded(b"dog") + END)
    assert read(path) == (["a", "c"], ["b"])


@pytest.mark.parametrize(
    "data", [b"", b"x" * 600, b"\x1f\x8b\x08" + b"x" * 99, b"BZh9" + b"x" * 99, b"\xfd7zXZ\0" + b"x" * 99]
)
@pytest.mark.parametrize("name", ["t.tar", "t.tar.gz", "t.tar.bz2", "t.tar.xz"])
def test_what_is_no_tar_is_dropped_by_name(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    records, dropped = read(tmp_path / name)
    assert not records and len(dropped) <= 1


def npz(shape: tuple, data: bytes, **more: bytes) -> bytes:
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, {"descr": "<f4", "fortran_order": False, "shape": shape})
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("norm_bb.npy", head.getvalue() + data)
        for name, value in more.items():
            archive.writestr(name, value)
    return file.getvalue()


@pytest.mark.parametrize("shape", [(1 << 20, 1 << 20), (2, 3), (1 << 62, 4), (0, 1 << 40), (-1, 4)])
def test_an_array_that_states_another_size_than_it_has_is_refused_before_it_is_made(shape):
    with pytest.raises(ValueError, match="states"):
        read_npz(npz(shape, bytes(16)))
    assert read_npz(npz((1, 4), bytes(16)))["norm_bb"].shape == (1, 4)


def test_no_damage_of_a_detectors_regions_raises_anything_but_a_value_error():
    rng = np.random.default_rng(0)
    whole = pack(Detections(np.array([[0, 0, 1, 1]], "f4"), np.ones((1, 8), "f2"), np.ones((1, 3), "f2")))
    for _ in range(200):
        data = bytearray(whole)
        data[rng.integers(len(data))] ^= 1 << int(rng.integers(8))
        try:
            regions = unpack(bytes(data[: int(rng.integers(len(data))) if rng.random() < 0.2 else len(data)]))
        except ValueError:
            continue
        assert regions.box_R4.shape == (1, 4)


def test_a_name_that_no_file_can_have_drops_its_record_alone(tmp_path):
    images = [{"id": i, "file_name": name} for i, name in enumerate(("a.png", "x" * 5000 + ".png", "b\0.png", "c.png"))]
    captions = [{"id": i, "image_id": i, "caption": "a cat"} for i in range(4)]
    (tmp_path / "annotations").mkdir()
    content = {"images": images, "annotations": captions}
    (tmp_path / "annotations/captions_train2017.json").write_text(json.dumps(content))
    for name in "ac":
        (tmp_path / f"{name}.png").write_bytes(picture())
    records, dropped = read(tmp_path)
    assert records == ["train2017/a", "train2017/c"] and len(dropped) == 2


def test_a_question_about_half_an_image_is_not_moved_to_another(tmp_path):
    questions = [
        {"question_id": i, "image_id": number, "question": "what?"} for i, number in enumerate((1, 1.5, math.inf, 2))
    ]
    (tmp_path / "v2_OpenEnded_mscoco_train2014_questions.json").write_text(json.dumps({"questions": questions}))
    (tmp_path / "train2014").mkdir()
    for number in (1, 2):
        (tmp_path / f"train2014/COCO_train2014_{number:012d}.jpg").write_bytes(picture())
    items = list(make_source(find_format(tmp_path, "vqa"), {}).read(tmp_path))
    assert [len(item.info["questions"]) for item in items if isinstance(item, Record)] == [1, 1]
    assert len([item for item in items if isinstance(item, Dropped)]) == 2
