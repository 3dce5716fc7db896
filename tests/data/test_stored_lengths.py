"""Lengths of rows are counted once, kept beside the index and mapped; a file that is not of these rows is not used."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from fastvlp.batch import Record
from fastvlp.data.records.shards import Shards, ShardWriter
from fastvlp.data.regions import RegionSource
from fastvlp.data.stored_lengths import caption_lengths
from fastvlp.data.tokenize import Tokenizer
from tests.processes import context

TEXTS = ["a red dog", "two", "a very large blue house near the river", ""]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "split"
    with ShardWriter(folder, per_shard=3) as writer:
        for i in range(8):
            captions = [f"{text} {i}" for text in TEXTS[: i % 4]]
            writer.write(Record(key=f"r{i}", images=(b"\xff\xd8",), info={"captions": captions}))
    return folder


def tokenizer(words: str = "a red dog two very large blue house near the river") -> Tokenizer:
    return Tokenizer.train([f"{words} 1 2 3 4 5 6 7"] * 3)


def forbidden(*_: object) -> None:
    raise AssertionError("counted again")


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("lengths-*.safetensors"))


def test_they_are_those_that_encoding_gives(folder: Path):
    shards, words = Shards(folder), tokenizer()
    lengths = caption_lengths(shards, words, "captions", 8)
    texts = [shards.info(i)["captions"] or [""] for i in range(len(shards))]
    assert np.diff(lengths.first_N).tolist() == [*map(len, texts)]
    assert lengths.tokens_T.tolist() == words.encode([text for own in texts for text in own], 8)[1].tolist()
    assert lengths.tokens_T.max() == 8
    (file,) = files(folder)
    assert file.parent == folder
    assert not any(path.suffix == ".part" for path in folder.iterdir())


def test_a_second_process_counts_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch):
    before = caption_lengths(Shards(folder), tokenizer(), "captions", 8)
    monkeypatch.setattr(Tokenizer, "lengths", forbidden)
    again = caption_lengths(Shards(folder), tokenizer(), "captions", 8)
    assert np.array_equal(again.tokens_T, before.tokens_T)
    assert not again.tokens_T.flags.writeable
    assert again.tokens_T.dtype.itemsize == again.first_N.dtype.itemsize == 4


@pytest.mark.parametrize(
    "change", [{"max_length": 5}, {"field": "captions_zh"}, {"regions": RegionSource(grid=2)}, {"words": "a red dog"}]
)
def test_other_rows_have_another_file(folder: Path, change: dict):
    def count(words: str | None = None, field: str = "captions", max_length: int = 8, **options):
        return caption_lengths(Shards(folder), tokenizer(words) if words else tokenizer(), field, max_length, **options)

    first, second = count(), count(**change)
    assert len(files(folder)) == 2
    assert "words" in change or not np.array_equal(first.tokens_T, second.tokens_T)


def test_changed_tars_are_counted_again(folder: Path):
    caption_lengths(Shards(folder), tokenizer(), "captions", 8)
    with ShardWriter(folder, append=True) as writer:
        writer.write(Record(key="new", images=(b"\xff\xd8",), info={"captions": ["a red dog"]}))
    lengths = caption_lengths(Shards(folder), tokenizer(), "captions", 8)
    assert lengths(torch.tensor([8]), torch.tensor([0])).tolist() == [5]


@pytest.mark.parametrize("place", [10, -1])
def test_a_damaged_file_is_made_again(folder: Path, place: int):
    before = caption_lengths(Shards(folder), tokenizer(), "captions", 8).tokens_T.tolist()
    (file,) = files(folder)
    data = bytearray(file.read_bytes())
    data[place] ^= 1
    file.write_bytes(data if place > 0 else data[:-9])
    assert caption_lengths(Shards(folder), tokenizer(), "captions", 8).tokens_T.tolist() == before
    assert file.read_bytes() != data


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_beside_read_only_tars_they_are_kept_in_the_cache(folder: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("FASTVLP_CACHE", str(tmp_path / "cache"))
    shards = Shards(folder)
    folder.chmod(0o555)
    try:
        caption_lengths(shards, tokenizer(), "captions", 8)
    finally:
        folder.chmod(0o755)
    assert not files(folder)
    assert [path.name.split(".")[1].split("-")[0] for path in (tmp_path / "cache").iterdir()] == ["lengths"]


def test_an_interrupted_count_leaves_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch):
    with monkeypatch.context() as patch:
        patch.setattr(Tokenizer, "lengths", forbidden)
        with pytest.raises(AssertionError):
            caption_lengths(Shards(folder), tokenizer(), "captions", 8)
    assert not [path for path in folder.iterdir() if "lengths" in path.name]
    assert caption_lengths(Shards(folder), tokenizer(), "captions", 8).first_N[-1] == 14


def _count(folder: Path, log: Path, _: int) -> list[int]:
    counting = Tokenizer.lengths

    def logged(self: Tokenizer, *arguments):
        with log.open("a") as out:
            out.write("counted\n")
        return counting(self, *arguments)

    Tokenizer.lengths = logged  # type: ignore[method-assign]
    return caption_lengths(Shards(folder), tokenizer(), "captions", 8).tokens_T.tolist()


def test_of_many_ranks_one_counts(folder: Path, tmp_path: Path):
    Shards(folder)
    with context().Pool(3) as pool:
        counted = pool.map(partial(_count, folder, tmp_path / "log"), range(3), chunksize=1)
    assert counted[0] == counted[1] == counted[2]
    assert (tmp_path / "log").read_text() == "counted\n"
