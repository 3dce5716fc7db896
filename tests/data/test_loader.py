import gc
import io
import tarfile
import threading

import numpy as np
import pytest
import torch
from PIL import Image

from fastvlp.batch import Batch, Dropped, Record
from fastvlp.data.batching import Grouping, Lengths
from fastvlp.data.loader import Loader, Row
from fastvlp.data.pairs import PairData, PairMaker
from fastvlp.data.records.schema import clean_text, usable_captions
from fastvlp.data.records.shards import Shards, ShardWriter
from fastvlp.data.records.transform import Transform
from fastvlp.data.tokenize import Tokenizer
from fastvlp.data.vocabulary_texts import readable_infos
from fastvlp.errors import UserError
from fastvlp.random import hash64


def make(rows: list[Row]) -> tuple[Batch, list[Dropped]]:
    """A batch that says which rows it was made of; record 13 is unreadable."""
    kept = [row for row in rows if row.index != 13]
    dropped = [Dropped(key="r13", reason="broken")] * (len(rows) - len(kept))
    index = torch.tensor([[row.index] for row in kept], dtype=torch.int64).reshape(-1, 1)
    seed = torch.tensor([row.seed for row in kept], dtype=torch.int64)
    image = torch.zeros(len(kept), 3, 2, 2, dtype=torch.uint8)
    return Batch(image=image, ids=index, length=torch.ones(len(kept), dtype=torch.int64), seed=seed), dropped


def taken(iterator, n):
    return [next(iterator) for _ in range(n)]


def same(a, b):
    return all(torch.equal(getattr(a, f), getattr(b, f)) for f in ("image", "ids", "length", "seed"))


def test_every_epoch_holds_each_record_once_in_a_new_order():
    loader = Loader(10, make, batch_size=4, seed=1)
    rows = [row for s in range(15) for row in loader.rows(s)]
    epochs = [rows[e * 10 : e * 10 + 10] for e in range(6)]
    orders = [[row.index for row in epoch] for epoch in epochs]
    assert all(sorted(order) == list(range(10)) for order in orders)
    assert len({tuple(order) for order in orders}) == 6
    assert all(row.seed == hash64(1, e, row.index) for e, epoch in enumerate(epochs) for row in epoch)
    assert loader.rows(0) == Loader(10, make, batch_size=4, seed=1).rows(0)
    assert loader.rows(0) != Loader(10, make, batch_size=4, seed=2).rows(0)


def test_resuming_at_any_batch_continues_the_straight_run():
    loader = Loader(11, make, batch_size=3, seed=5)
    straight = taken(loader.batches(), 12)
    for start in (0, 1, 5, 11):
        again = taken(Loader(11, make, batch_size=3, seed=5).batches(start), 12 - start)
        assert all(same(a, b) for (a, _), (b, _) in zip(straight[start:], again))


@pytest.mark.parametrize("world", [2, 3])
def test_the_ranks_together_are_one_rank_with_the_global_batch(world):
    whole = Loader(17, make, batch_size=2 * world, seed=3)
    parts = [Loader(17, make, batch_size=2, seed=3, rank=r, world=world) for r in range(world)]
    for s in range(20):
        assert whole.rows(s) == [row for part in parts for row in part.rows(s)]


@pytest.mark.parametrize("grouping", [None, Grouping(group=12), Grouping(group=9, max_tokens=30, multiple=1)])
@pytest.mark.parametrize(("world", "cut"), [(2, 1), (1, 1), (3, 3), (4, 2), (12, 3)])
def test_other_ranks_have_the_same_rows_in_each_step(world, cut, grouping):
    """Began on 2 ranks with accumulation 2: 4 planned batches a step."""
    tokens = torch.arange(2, 9).repeat(3)[:17]
    own = {"batch_size": 6, "seed": 3, "grouping": grouping, "lengths": lambda: Lengths(tokens.numpy(), np.arange(18))}
    began = [Loader(17, make, rank=rank, world=2, **own) for rank in range(2)]
    now = [Loader(17, make, rank=rank, world=world, planned_for=2, cut=cut, **own) for rank in range(world)]
    micro = 4 * cut // world
    for step in range(9):
        then = [row for s in (2 * step, 2 * step + 1) for loader in began for row in loader.rows(s)]
        rows = [row for s in range(step * micro, (step + 1) * micro) for loader in now for row in loader.rows(s)]
        assert rows == then
        assert now[0].place(step * micro) == began[0].place(2 * step)
        assert now[0].batch_behind(began[0].place(2 * step)) == step * micro
        assert now[0].planned(step * micro) == 2 * step and now[0].dealt(4 * step) == step * micro


def test_a_source_smaller_than_one_batch_repeats_over_epochs():
    loader = Loader(2, make, batch_size=5, seed=0)
    (batch, _), *_ = taken(loader.batches(), 3)
    assert sorted(batch.ids[:4].flatten().tolist()) == [0, 0, 1, 1]
    assert len(batch.seed.unique()) == 5


def test_worker_processes_change_nothing():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    alone = taken(Loader(20, make, batch_size=4, seed=2).batches(3), 8)
    helped = taken(Loader(20, make, batch_size=4, seed=2, workers=2).batches(3), 8)
    for (a, x), (b, y) in zip(alone, helped):
        assert same(a, b)
        assert x == y
    assert any(dropped for _, dropped in alone)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("workers", [0, 2])
def test_once_gives_every_record_once_in_order_and_ends(workers):
    for world in (1, 3):
        seen = []
        for rank in range(world):
            loader = Loader(11, make, batch_size=3, seed=0, rank=rank, world=world, workers=workers)
            batches = [batch.ids.flatten().tolist() for batch, _ in loader.once()]
            assert [i for batch in batches for i in batch] == list(range(rank, 11, world))
            seen += range(rank, 11, world)
        assert sorted(seen) == list(range(11))
    assert list(Loader(1, make, batch_size=3, seed=0, rank=1, world=2).once()) == []
    iterator = Loader(3, make, batch_size=3, seed=0, workers=workers).once()
    assert len(list(iterator)) == 1
    assert next(iterator, None) is None


@pytest.mark.parametrize("workers", [0, 1])
def test_a_batch_of_unreadable_records_stops_with_their_names(workers):
    loader = Loader(14, make, batch_size=1, seed=0, workers=workers)
    with pytest.raises(UserError, match=r"no record of batch \d+ can be used \(r13: broken\)") as caught:
        taken(loader.batches(), 14)
    assert "Traceback" not in str(caught.value)


def fail(rows):
    raise RuntimeError(f"bug with {rows[0].index}")


def test_an_exception_reaches_the_caller():
    with pytest.raises(RuntimeError, match="bug with 0"):
        next(Loader(5, fail, batch_size=1, seed=0).once())


def prefetching() -> int:
    return sum(thread.name == "prefetch" for thread in threading.enumerate())


def test_the_thread_ends_when_its_iterator_is_closed_or_dropped():
    before = prefetching()
    iterator = Loader(5, make, batch_size=2, seed=0).batches()
    next(iterator)
    assert prefetching() == before + 1
    iterator.close()
    assert prefetching() == before
    assert next(iterator, None) is None
    iterator = Loader(5, make, batch_size=2, seed=0).batches()
    next(iterator)
    del iterator
    gc.collect()
    assert prefetching() == before


def test_batches_are_made_while_the_caller_computes():
    made, third = [], threading.Event()

    def noted(rows):
        made.append(rows)
        if len(made) == 3:
            third.set()
        return make(rows)

    iterator = Loader(5, noted, batch_size=2, seed=0).batches()
    next(iterator)
    assert third.wait(timeout=60)
    iterator.close()


@pytest.mark.parametrize("workers", [0, 1])
def test_pinning_copies_every_tensor_and_leaves_none_alone(monkeypatch, workers):
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda t: pinned.append(t.shape) or t.clone())
    iterator = Loader(5, make, batch_size=2, seed=0, workers=workers, pin=True).once()
    batches = [batch for batch, _ in iterator]
    assert len(pinned) == 4 * 3
    assert all(batch.slot is None for batch in batches)
    assert sorted(torch.cat([batch.ids for batch in batches]).flatten().tolist()) == list(range(5))


def test_an_empty_source_is_refused():
    with pytest.raises(UserError, match="data set is empty"):
        Loader(0, make, batch_size=2, seed=0)


# --- pairs -----------------------------------------------------------------------------------------------------------

TEXTS = ["a red dog runs", "two blue cats sleep on the grass", "一只猫坐在桌子上"]


def jpeg(i: int) -> bytes:
    out = io.BytesIO()
    pixels = np.random.default_rng(i).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((70, 50)).save(out, "JPEG")
    return out.getvalue()


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(TEXTS * 3, vocab_size=200)


def split(folder, infos, images=None) -> Shards:
    with ShardWriter(folder) as writer:
        for i, info in enumerate(infos):
            writer.write(Record(key=f"p{i}", images=((images or {}).get(i, jpeg(i)),), info=info))
    return Shards(folder)


def rows(n: int, epoch: int = 0) -> list[Row]:
    return [Row(i, hash64(0, epoch, i)) for i in range(n)]


def test_pairs_are_decoded_tokenised_and_padded(tmp_path, tokenizer):
    shards = split(tmp_path, [{"captions": TEXTS}, {"captions": TEXTS[0]}, {"captions": TEXTS[:2]}])
    maker = PairMaker(shards, Transform(size=16), tokenizer, max_length=20)
    seen = set()
    for epoch in range(12):
        batch, dropped = maker(rows(3, epoch))
        assert dropped == []
        assert batch.image.shape == (3, 3, 16, 16)
        assert batch.image.dtype == torch.uint8
        assert batch.ids.shape == (3, int(batch.length.max()))
        assert batch.seed.tolist() == [row.seed for row in rows(3, epoch)]
        seen.add(tokenizer.decode(batch.ids[0]))
        assert tokenizer.decode(batch.ids[1]) == TEXTS[0]
        alone, _ = maker(rows(3, epoch)[2:])
        assert torch.equal(alone.ids[0], batch.ids[2, : batch.length[2]])
        assert torch.equal(alone.image[0], batch.image[2])
    assert seen == set(TEXTS)


@pytest.mark.parametrize("workers", [0, 2])
def test_cached_images_are_the_same_images(tmp_path, tokenizer, workers):
    shards = split(tmp_path, [{"captions": TEXTS}] * 5)
    runs = []
    for cache in (False, True):
        maker = PairMaker(shards, Transform(size=16), tokenizer, max_length=20, cache=cache)
        iterator = Loader(5, maker, batch_size=2, seed=0, workers=workers if cache else 0).batches()
        runs.append(taken(iterator, 12))
        # Its thread ends before the next loader forks: a fork in the middle of its work may leave a lock taken.
        del iterator
        if cache:
            # Filled by the workers in the memory of this process.
            assert all(i in maker.reader.cache for i in range(5))
    assert all(same(a, b) for (a, _), (b, _) in zip(*runs))


def test_unusable_records_are_dropped_by_name_in_training_and_refused_in_evaluation(tmp_path, tokenizer):
    infos = [
        {"captions": TEXTS},
        {"captions": []},
        {"captions": ["", "  \n", 3, None, "\x00\x07"]},
        {"text": "elsewhere"},
        {"captions": TEXTS},
        {"captions": ["", TEXTS[0]]},
    ]
    shards = split(tmp_path, infos, {4: jpeg(4)[:300]})
    maker = PairMaker(shards, Transform(size=16), tokenizer, max_length=20)
    batch, dropped = maker(rows(6))
    assert len(batch) == 2
    assert [d.key for d in dropped] == ["p1", "p2", "p3", "p4"]
    assert "no usable caption in 'captions' (fields: text)" in dropped[2].reason
    assert "truncated image" in dropped[3].reason
    strict = PairMaker(shards, Transform(size=16), tokenizer, max_length=20, strict=True)
    assert len(strict([rows(6)[0], rows(6)[5]])[0]) == 2
    with pytest.raises(UserError, match=r"4 records cannot be used \(p1: .*vlp data inspect"):
        strict(rows(6))
    with pytest.raises(UserError, match=r"no record of batch 0 can be used \(p1: "):
        next(Loader(1, lambda r: maker([Row(1, 0)]), batch_size=1, seed=0).batches())


def test_text_that_is_not_utf8_is_dropped_and_damaged_tars_are_refused_in_evaluation(tmp_path, tokenizer):
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name, data in [("a.jpg", jpeg(0)), ("a.txt", b"caf\xe9"), ("b.jpg", jpeg(1)), ("b.txt", b"a red dog")]:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    (tmp_path / "1.tar").write_bytes((tmp_path / "0.tar").read_bytes()[:700])
    shards = Shards(tmp_path)
    batch, dropped = PairMaker(shards, Transform(size=16), tokenizer, max_length=20)(rows(2))
    assert len(batch) == 1
    assert dropped == [Dropped(key="a", reason="txt is not UTF-8 (byte 3); save it as UTF-8")]
    with pytest.raises(UserError, match=r"1\.tar: cut in the middle"):
        PairMaker(shards, Transform(size=16), tokenizer, max_length=20, strict=True)
    assert list(PairData(train=str(tmp_path), batch_size=1).texts()) == ["a red dog"]


def test_a_tokenizer_reads_every_text_that_training_reads(tmp_path):
    split(tmp_path, [{"captions": "one text"}, {"captions": ["a\x00 b", 7], "questions": [{"question": "c?"}, "d"]}])
    assert list(PairData(train=str(tmp_path), batch_size=1).texts()) == ["one text", "a b", "c?"]


def test_a_caption_of_100000_characters_is_cut(tmp_path, tokenizer):
    shards = split(tmp_path, [{"captions": ["a red dog\x00 runs\t" * 6000]}])
    batch, _ = PairMaker(shards, Transform(size=16), tokenizer, max_length=12)(rows(1))
    assert batch.length.tolist() == [12]
    assert batch.ids[0, -1] == tokenizer.eos


def test_captions_are_cleaned():
    assert clean_text(" a\x00 b\r\n\tc\ufeff ") == "a b c"
    assert clean_text("x\ud800y") == "x y"
    assert clean_text("naïve 猫 👩‍🚀") == "naïve 猫 👩‍🚀"
    assert clean_text(7) is None
    assert clean_text("\x07") is None


def test_captions_of_two_languages_are_those_of_both():
    info = {"captions": ["a dog", 3], "captions_zh": "一只狗"}
    assert usable_captions(info, "captions+captions_zh") == ["a dog", "一只狗"]
    assert usable_captions(info, "captions+captions_de") == ["a dog"]


@pytest.mark.parametrize("ahead", [0, 3])
def test_a_vocabulary_is_trained_on_a_sample_spread_over_the_records(tmp_path, ahead):
    with ShardWriter(tmp_path, per_shard=7) as writer:
        for i in range(60):
            writer.write(Record(key=f"r{i}", images=(b"\xff\xd8",), info={"captions": [str(i)]}))
    data = PairData(train=str(tmp_path), batch_size=1, vocab_records=12)
    seen = [int(text) for text in data.texts()]
    assert seen == [*map(int, data.texts())]
    assert [i // 5 for i in seen] == [*range(12)]
    assert seen != [*range(0, 60, 5)]
    held = [int(info["captions"][0]) for info in readable_infos(Shards(tmp_path), ahead, 12)]
    assert len(held) == len({*held}) == 12
    assert held == sorted(held)


@pytest.mark.parametrize("most", [60, 61, None])
def test_of_few_records_all_are_read(tmp_path, most):
    with ShardWriter(tmp_path) as writer:
        for i in range(60):
            writer.write(Record(key=f"r{i}", images=(b"\xff\xd8",), info={"captions": [str(i)]}))
    assert [*PairData(train=str(tmp_path), batch_size=1, vocab_records=most).texts()] == [*map(str, range(60))]
