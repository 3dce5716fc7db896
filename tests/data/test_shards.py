import errno
import hashlib
import io
import json
import os
import pickle
import tarfile

import fsspec
import numpy as np
import pytest
import webdataset
from PIL import Image

from fastvlp.batch import Record
from fastvlp.data.part_file import open_part
from fastvlp.data.records.index_files import NAME
from fastvlp.data.records.shards import RecordError, Shards, ShardWriter
from fastvlp.data.records.tar_index import KINDS, scan
from fastvlp.errors import UserError


def encoded(format: str, colour: int = 0) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (8, 6), (colour % 256, 10, 20)).save(out, format)
    return out.getvalue()


def record(i: int, images: int = 1) -> Record:
    info = {"captions": [f"caption {i}", "第二句"], "objects": [{"class": "dog", "box": [0, 0, 4, 4]}]}
    kinds = ["JPEG", "PNG", "WEBP"]
    return Record(key=f"r{i:04d}", images=tuple(encoded(kinds[(i + k) % 3], i) for k in range(images)), info=info)


@pytest.fixture
def split(tmp_path):
    with ShardWriter(tmp_path / "split", per_shard=4) as writer:
        for i in range(10):
            writer.write(record(i, images=1 + i % 2))
    return tmp_path / "split"


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def test_what_was_written_is_read(split):
    assert sorted(p.name for p in split.iterdir()) == [*(f"0000{t}.tar" for t in range(3)), NAME]
    shards = Shards(split)
    assert len(shards) == 10
    assert shards.keys == [f"r{i:04d}" for i in range(10)]
    assert shards.damage == []
    for i in (9, 0, 4, 3):
        assert shards.read(i) == record(i, images=1 + i % 2)
        assert shards.info(i) == record(i).info
        assert shards.key(i) == f"r{i:04d}"
    assert [r.key for r in shards] == shards.keys
    with pytest.raises(IndexError, match="record 10 of 10"):
        shards.read(10)


def test_the_same_records_give_the_same_bytes(split, tmp_path):
    with ShardWriter(tmp_path / "again", per_shard=4) as writer:
        for i in range(10):
            writer.write(record(i, images=1 + i % 2))
    for tar in split.glob("*.tar"):
        assert (tmp_path / "again" / tar.name).read_bytes() == tar.read_bytes()


def test_webdataset_reads_what_is_written(split):
    urls = [str(p) for p in sorted(split.glob("*.tar"))]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert [s["__key__"] for s in samples] == [f"r{i:04d}" for i in range(10)]
    assert json.loads(samples[3]["json"])["captions"] == ["caption 3", "第二句"]
    assert samples[0]["jpg"] == record(0).images[0]


def test_what_webdataset_writes_is_read(tmp_path):
    with webdataset.TarWriter(str(tmp_path / "0.tar")) as sink:
        sink.write({"__key__": "a/x", "jpg": encoded("JPEG"), "txt": "un chat", "json": {"url": "u"}, "cls": 3})
        sink.write({"__key__": "a/y", "0.png": encoded("PNG"), "1.png": encoded("PNG", 9), "txt": "zwei Hunde"})
    shards = Shards(tmp_path)
    assert shards.keys == ["a/x", "a/y"]
    assert shards.info(0) == {"url": "u", "captions": ["un chat"]}
    assert shards.read(1).images == (encoded("PNG"), encoded("PNG", 9))


def test_a_single_tar_and_a_remote_split(split):
    assert Shards(split / "00001.tar").keys == [f"r{i:04d}" for i in range(4, 8)]
    remote = fsspec.filesystem("memory")
    remote.put(str(split / "00000.tar"), "/data/split/00000.tar")
    remote.put(str(split / "00002.tar"), "/data/split/00002.tar")
    remote.put(str(split / NAME), f"/data/split/{NAME}")
    try:
        shards = Shards("memory://data/split")
        assert len(shards) == 6
        assert shards.read(1) == record(1, images=2)
        assert pickle.loads(pickle.dumps(shards)).read(5) == record(9, images=2)
    finally:
        remote.rm("/data", recursive=True)


def test_pickled_shards_read_the_same(split):
    shards = Shards(split)
    shards.read(0)
    assert pickle.loads(pickle.dumps(shards)).read(7) == record(7, images=2)


def test_an_index_of_other_tars_or_broken_is_made_again(split):
    tar, index = split / "00000.tar", split / NAME
    tar.write_bytes((split / "00001.tar").read_bytes())
    assert Shards(split).keys[:4] == [f"r{i:04d}" for i in range(4, 8)]
    for broken in (b"", b"{", bytes(8), b"\xff" * 100, bytes([8, *bytes(7)]) + b"[1, 2]  "):
        index.write_bytes(broken)
        assert Shards(split).read(0) == record(4)
    good = index.read_bytes()
    stamp = index.stat().st_mtime_ns
    Shards(split)
    assert (index.read_bytes(), index.stat().st_mtime_ns) == (good, stamp)


def test_an_index_is_made_of_what_an_older_one_says_of_the_same_tars(split, monkeypatch):
    scanned = []

    def counted(file, name, size):
        scanned.append(name)
        return scan(file, name, size)

    monkeypatch.setattr("fastvlp.data.records.index_files.scan", counted)
    whole = Shards(split)
    (split / "00001.tar").unlink()
    assert Shards(split).keys == whole.keys[:4] + whole.keys[8:] and Shards(split / "00002.tar").read(1) == whole.read(
        9
    )
    assert scanned == []
    with ShardWriter(split, append=True) as writer:
        writer.write(record(77))
    assert [*map(os.path.basename, scanned)] == ["00003.tar"]
    again = Shards(split)
    assert again.keys[-1] == "r0077" and again.read(len(again) - 1) == record(77)


def test_hashes_of_records_say_whether_they_are_the_same(split, tmp_path):
    """States that were stored, and runs that are continued, are recognised by these."""
    shards = Shards(split)
    digest, whole = hashlib.sha256(), hashlib.sha256("\n".join(shards.keys).encode())
    places = [shards.place(i)[1] for i in range(10)]
    for tar, span in ((f"0000{t}.tar", range(4 * t, min(10, 4 * t + 4))) for t in range(3)):
        stat = (split / tar).stat()
        head = f"{tar} {stat.st_size} {stat.st_mtime_ns} {len(span)}\n" + "\n".join(shards.key(i) for i in span)
        digest.update(head.encode())
        digest.update(np.cumsum([0, *(len(places[i]) for i in span)]).tobytes())
        for part in ("offset", "length"):
            digest.update(np.array([getattr(one, part) for i in span for one in places[i]]).tobytes())
    assert shards.fingerprint == digest.hexdigest()
    members = [one for place in places for one in place]
    whole.update(np.array([len(place) for place in places]).tobytes())
    whole.update(np.array([KINDS.index(one.kind) for one in members], np.uint8).tobytes())
    whole.update(np.array([one.length for one in members]).tobytes())
    for i in range(0, 10, 2):
        whole.update(b"".join(shards.images(i)) + json.dumps(record(i).info, ensure_ascii=False).encode())
    assert shards.content == whole.hexdigest()
    for tar in split.glob("*.tar"):
        (tmp_path / "copy").mkdir(exist_ok=True)
        (tmp_path / "copy" / tar.name).write_bytes(tar.read_bytes())
    copy = Shards(tmp_path / "copy")
    assert copy.content == shards.content and copy.fingerprint != shards.fingerprint


def test_the_index_of_a_split_that_cannot_be_written_is_kept_elsewhere(split, monkeypatch, tmp_path):
    monkeypatch.setenv("FASTVLP_CACHE", str(tmp_path / "cache"))
    (split / NAME).unlink()
    read_only = {split}

    def refuse(path, *arguments):
        if path.parent in read_only:
            raise OSError(errno.EROFS, "Read-only file system")
        return open_part(path, *arguments)

    monkeypatch.setattr("fastvlp.data.part_file.open_part", refuse)
    assert len(Shards(split)) == 10
    (kept,) = (tmp_path / "cache").iterdir()
    kept.unlink()
    read_only.add(kept.parent)
    shards = Shards(split)
    assert list(kept.parent.iterdir()) == [] and not (split / NAME).exists()
    assert pickle.loads(pickle.dumps(shards)).read(7) == record(7, images=2)


def test_the_index_of_a_remote_split_is_made_once(split, monkeypatch, tmp_path):
    monkeypatch.setenv("FASTVLP_CACHE", str(tmp_path / "cache"))
    remote = fsspec.filesystem("memory")
    for tar in split.glob("*.tar"):
        remote.put(str(tar), f"/once/split/{tar.name}")
    try:
        first = Shards("memory://once/split")
        monkeypatch.setattr("fastvlp.data.records.index_files.scan", lambda *_: pytest.fail("scanned again"))
        assert Shards("memory://once/split").keys == first.keys == Shards(split).keys
    finally:
        remote.rm("/once", recursive=True)


@pytest.mark.parametrize("keep", ["in a member", "at a member's end", "in a header"])
def test_a_tar_cut_in_the_middle_gives_the_records_before_the_cut(split, keep):
    with tarfile.open(split / "00001.tar") as tar:
        third = tar.getmember("r0006.jpg")
    size = {"in a member": third.offset_data + 20, "at a member's end": third.offset, "in a header": third.offset + 99}
    os.truncate(split / "00001.tar", size[keep])
    for _ in range(2):  # scanned, then from the index
        shards = Shards(split)
        # r0005 may have lost a member at the cut; only where r0006 has begun is it known to be whole.
        whole = ["r0004", "r0005"] if keep == "in a member" else ["r0004"]
        assert [k for k in shards.keys if "r0004" <= k <= "r0007"] == whole
        assert "00001.tar" in shards.damage[0].key
        assert "cut" in shards.damage[0].reason
        assert shards.read(len(shards) - 1) == record(9, images=2)


def test_a_damaged_header_ends_the_tar_with_a_report(split):
    with tarfile.open(split / "00000.tar") as tar:
        offset = tar.getmember("r0002.webp").offset
    with (split / "00000.tar").open("r+b") as file:
        file.seek(offset)
        file.write(b"\x55" * 512)
    shards = Shards(split)
    assert shards.keys[:2] == ["r0000", "r0004"]
    assert any("damaged after byte" in d.reason for d in shards.damage)


def test_no_shards_and_only_broken_shards_name_folder_and_remedy(tmp_path):
    with pytest.raises(UserError, match=r"nowhere: no shards .*folder does not exist.*vlp data import"):
        Shards(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"no shards .*vlp data import"):
        Shards(tmp_path)
    for split in ("train", "val"):
        (tmp_path / "all" / split).mkdir(parents=True)
        (tmp_path / "all" / split / "0.tar").touch()
    (tmp_path / "all" / "empty").mkdir()
    with pytest.raises(
        UserError, match=r"all: no shards .* its folders train, val have some: give one of them, such as .*all/train$"
    ):
        Shards(tmp_path / "all")
    (tmp_path / "0.tar").write_bytes(b"this is no tar" * 100)
    (tmp_path / "1.tar").write_bytes(b"")
    with pytest.raises(UserError, match=r"no readable record in 2 tars.*0\.tar"):
        Shards(tmp_path)


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("a.json", b"{", "json cannot be parsed"),
        ("a.json", b"[1]", "json is a list"),
        ("a.json", '{"captions": ["caf\u00e9"]}'.encode("latin-1"), "json is not UTF-8"),
        ("a.json", b"[" * 100_000, "json cannot be parsed"),
        ("a.txt", b"caf\xe9", "txt is not UTF-8"),
    ],
)
def test_text_that_cannot_be_read_drops_its_record_by_name(tmp_path, name, data, reason):
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        add(tar, "a.jpg", encoded("JPEG"))
        add(tar, name, data)
        add(tar, "b.jpg", encoded("JPEG"))
        add(tar, "c.txt", b"no image")
    shards = Shards(tmp_path)
    with pytest.raises(RecordError, match=reason) as caught:
        shards.read(0)
    assert caught.value.dropped.key == "a"
    assert shards.read(1).info == {}
    with pytest.raises(RecordError, match="c: no image"):
        shards.read(2)


def test_links_and_absolute_names_in_a_tar_touch_nothing(tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        link = tarfile.TarInfo("a.json")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
        add(tar, "/../../b.txt", b"text")
        add(tar, "c.jpg", encoded("JPEG"))
    assert Shards(tmp_path).keys == ["/../../b", "c"]


def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch):
    folder = tmp_path / "split"
    room = 12_000
    write = tarfile.TarFile.addfile

    def limited(self, member, data):
        if self.fileobj.tell() + member.size > room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(self, member, data)

    monkeypatch.setattr(tarfile.TarFile, "addfile", limited)
    message = r"split/00001\.tar\.tmp: cannot write \(No space left on device\); free space"
    with pytest.raises(UserError, match=message), ShardWriter(folder, per_shard=5) as writer:
        for i in range(5):
            writer.write(record(i))
        room = 3_000
        for i in range(5, 10):
            writer.write(record(i))
    assert list(folder.iterdir()) == []


def test_an_interrupted_import_leaves_no_split(tmp_path):
    with pytest.raises(KeyboardInterrupt), ShardWriter(tmp_path, per_shard=2) as writer:
        for i in range(5):
            writer.write(record(i))
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_the_writer_refuses_what_a_tar_cannot_hold(tmp_path):
    image = (encoded("PNG"),)
    for key in ("", "a.b", "/a", "a\nb"):
        with pytest.raises(UserError, match="record key"), ShardWriter(tmp_path) as writer:
            writer.write(Record(key=key, images=image, info={}))
    with pytest.raises(UserError, match=r"record a: .*info"), ShardWriter(tmp_path) as writer:
        writer.write(Record(key="a", images=image, info={"captions": {1, 2}}))
    with pytest.raises(UserError, match=r"record a: .*info"), ShardWriter(tmp_path) as writer:
        writer.write(Record(key="a", images=image, info={"captions": ["\ud800"]}))
    with pytest.raises(UserError, match=r"called a\b"), ShardWriter(tmp_path) as writer:
        writer.write(Record(key="a", images=image, info={}))
        writer.write(Record(key="a", images=image, info={}))
    with ShardWriter(tmp_path) as writer:
        writer.write(Record(key="k" * 300, images=image, info={}))
    assert Shards(tmp_path).keys == ["k" * 300]
    with pytest.raises(UserError, match=str(tmp_path)), ShardWriter(tmp_path):
        pass
