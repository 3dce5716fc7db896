"""Decoded images are kept as far as there is memory, and images without room are decoded each time."""

from __future__ import annotations

import gc
import mmap
import pickle
from pathlib import Path
from weakref import WeakSet

import pytest
import torch

from fastvlp.data import image_cache
from fastvlp.data.image_cache import ImageCache, free_memory, room_for_images
from fastvlp.data.reader import RecordReader
from fastvlp.data.records.decode import StoredShape
from fastvlp.data.records.shards import Shards, ShardWriter
from fastvlp.data.records.transform import Transform
from tests.training.runs import made_records

EACH = 3 * 8 * 8 + 13


@pytest.fixture(autouse=True)
def no_other_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_cache, "_CACHES", WeakSet())


def test_where_there_is_room_nothing_is_said(capfd: pytest.CaptureFixture[str]) -> None:
    cache = room_for_images("split", 5, 8)
    assert cache is not None and len(cache) == 5
    assert capfd.readouterr().err == ""


def test_without_room_for_all_the_first_are_kept_and_a_line_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with ShardWriter(tmp_path) as writer:
        for record in made_records(6):
            writer.write(record)
    monkeypatch.setattr(image_cache, "free_memory", lambda: 2 * 4 * EACH)
    reader = RecordReader(Shards(tmp_path), Transform(size=8), cache=True)
    told = capfd.readouterr().err
    assert told.count("\n") == 1 and "6" in told and "4" in told and str(tmp_path) in told
    plain = RecordReader(Shards(tmp_path), Transform(size=8))
    for _ in range(2):
        for i in range(6):
            assert torch.equal(reader.record(i).images[0], plain.record(i).images[0])
            assert reader.record(i).shapes == plain.record(i).shapes
    assert [i in reader.cache for i in range(6)] == [True] * 4 + [False] * 2
    assert len(pickle.loads(pickle.dumps(reader)).cache) == 4


def test_the_processes_of_a_machine_share_its_memory(monkeypatch: pytest.MonkeyPatch, capfd) -> None:
    monkeypatch.setattr(image_cache, "free_memory", lambda: 2 * 4 * EACH)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    cache = room_for_images("split", 6, 8)
    assert cache is not None and len(cache) == 2
    assert capfd.readouterr().err == "", "the first process of the machine says it"


def test_what_other_caches_will_take_is_not_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_cache, "free_memory", lambda: 16 * EACH)
    caches = [room_for_images("split", 100, 8) for _ in range(6)]
    # Half of 16, of the 8 that are left, of 4, of 2; then there is room for none.
    assert [len(cache) if cache else 0 for cache in caches] == [8, 4, 2, 1, 0, 0]
    first = caches[0]
    assert first is not None and first.unfilled == 8 * EACH
    # The memory of an image that is there is no longer free, and the system says so.
    for place in (0, 3):
        first.put(place, torch.zeros(3, 8, 8, dtype=torch.uint8), StoredShape(8, 8, 1))
    assert first.unfilled == 6 * EACH
    del first, caches
    gc.collect()
    again = room_for_images("split", 100, 8)
    assert again is not None and len(again) == 8


def test_the_promises_of_the_other_processes_of_a_machine_count_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_cache, "free_memory", lambda: 16 * EACH)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    first, second = (room_for_images("split", 100, 8) for _ in range(2))
    assert first is not None and second is not None and (len(first), len(second)) == (4, 2)


@pytest.mark.parametrize("free", [None, 10**30])
def test_where_the_system_refuses_memory_there_is_no_cache(monkeypatch: pytest.MonkeyPatch, capfd, free) -> None:
    def refuse(*_: object) -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(image_cache, "free_memory", lambda: free)
    monkeypatch.setattr(mmap, "mmap", refuse)
    assert room_for_images("split", 6, 8) is None
    assert capfd.readouterr().err.count("\n") == 1


def test_a_million_large_images_are_no_crash(capfd: pytest.CaptureFixture[str]) -> None:
    cache = room_for_images("split", 10**9, 384)
    assert cache is None or len(cache) < 10**9
    assert "split: 1,000,000,000 decoded images" in capfd.readouterr().err


def test_the_free_memory_is_that_of_the_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = free_memory()
    assert machine is None or machine > 0
    for name, text in (("max", "5000"), ("current", "4500"), ("stat", "anon 3\ninactive_file 100\n")):
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(image_cache, "_LIMITS", (tuple(str(tmp_path / name) for name in ("max", "current", "stat")),))
    assert machine is None or free_memory() == 600
    (tmp_path / "max").write_text("max")
    assert machine is None or free_memory() > 10**6


def test_a_place_without_room_stays_empty() -> None:
    cache = ImageCache(2, 8)
    cache.put(2, torch.zeros(3, 8, 8, dtype=torch.uint8), StoredShape(8, 8, 1))
    assert 2 not in cache and 0 not in cache
