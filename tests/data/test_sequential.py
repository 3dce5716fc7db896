"""Records that are read as they are stored: each once an epoch, in few reads, by every rank its own, and the same after a run
was resumed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fastvlp.data.loader import Loader
from fastvlp.data.pairs import PairData
from fastvlp.data.records.held_members import GAP, HeldMembers, Place, spans
from fastvlp.data.records.shards import Shards, ShardWriter
from fastvlp.data.sequential import _DRAW, _REST, ReadAhead, SequentialReading, through_buffer
from fastvlp.errors import UserError
from fastvlp.random import hash64
from fastvlp.training.loop import start, train
from tests.data.test_remote import serving
from tests.training.runs import assert_equal, made_pairs, made_records, made_run, stopped_after, weights

SIZES = (5, 9, 1, 7, 4)


@pytest.mark.parametrize(("count", "buffer"), [(20, 6), (20, 1), (5, 9), (0, 4), (7, 7)])
def test_rows_leave_a_buffer_as_in_a_plain_loop(count, buffer):
    size = min(buffer, count)
    waits, known = list(range(size)), []
    for p in range(count - size):
        slot = hash64(3, _DRAW, 2, 1, p) % size
        known.append(waits[slot])
        waits[slot] = p + size
    known += sorted(waits, key=lambda item: hash64(3, _REST, 2, 1, waits.index(item)))
    assert through_buffer(count, buffer, 3, 2, 1).tolist() == known


def reading(buffer=6, streams=1, block=3, shards=None):
    return SequentialReading(shards=shards, sizes=SIZES, buffer=buffer, streams=streams, block=block)


def loaders(world=1, batch_size=3, **options):
    own = {"batch_size": batch_size, "seed": 1, "world": world, "reading": reading(**options)}
    return [Loader(sum(SIZES), None, rank=rank, **own) for rank in range(world)]


@pytest.mark.parametrize(("world", "streams", "batch_size"), [(1, 1, 3), (2, 1, 3), (2, 2, 4), (1, 3, 26), (3, 1, 40)])
def test_each_epoch_has_each_record_once_and_ranks_have_others(world, streams, batch_size):
    count, epochs = sum(SIZES), 2 * batch_size
    ranks = loaders(world, batch_size, streams=streams)
    rows = [row for s in range(count * epochs // batch_size // world) for loader in ranks for row in loader.rows(s)]
    orders = [[row.index for row in rows[e * count : (e + 1) * count]] for e in range(len(rows) // count)]
    assert len(orders) > 1 and all(sorted(order) == list(range(count)) for order in orders)
    assert orders[0] != orders[1]
    assert len({row.seed for row in rows}) == len(rows)


def test_neighbours_stay_near_and_shards_change_their_order():
    (loader,) = loaders(batch_size=1, buffer=3)
    tars = torch.repeat_interleave(torch.arange(5), torch.tensor(SIZES))
    firsts = set()
    for epoch in range(6):
        order = [int(tars[loader.rows(26 * epoch + s)[0].index]) for s in range(26)]
        firsts.add(order[0])
        # A row comes from one of few shards: those that the last few records are of.
        assert all(len(set(order[s : s + 3])) <= 3 for s in range(26))
    assert len(firsts) > 1


@pytest.mark.parametrize(("world", "streams"), [(1, 1), (2, 2), (1, 4)])
@pytest.mark.parametrize("begin", [0, 1, 5, 16])
def test_each_record_is_read_once_before_its_row_and_few_wait(world, streams, begin):
    for rank, loader in enumerate(loaders(world, streams=streams, buffer=8)):
        ahead, waiting, entered, taken = ReadAhead(loader.stored_order), [], 0, 0
        for s in range(begin, begin + 40):
            new = ahead.before(s * world + rank)
            entered += len(new)
            waiting += new
            for row in loader.rows(s):
                waiting.remove(row.index)
                taken += 1
            assert len(waiting) <= 8 + streams * 3
        assert entered == taken + len(waiting)


def test_fewer_ranks_read_each_record_once_too():
    own = {"batch_size": 3, "seed": 1, "reading": reading(streams=2, buffer=8)}
    began = [Loader(sum(SIZES), None, rank=rank, world=4, **own) for rank in range(4)]
    for rank in range(2):
        loader = Loader(sum(SIZES), None, rank=rank, world=2, planned_for=4, **own)
        ahead, waiting = ReadAhead(loader.stored_order), []
        for s in range(5, 60):
            waiting += ahead.before(s * 2 + rank)
            t = s * 2 + rank
            assert loader.rows(s) == began[t % 4].rows(t // 4)
            for row in loader.rows(s):
                waiting.remove(row.index)
            assert len(waiting) <= 2 * (8 + 2 * 3)
    with pytest.raises(UserError, match=r"data\.order.* divides 4"):
        Loader(sum(SIZES), None, rank=0, world=3, planned_for=4, **own)


def test_members_are_read_in_few_spans_and_kept_for_each_use():
    places = [Place("a", 0, 10), Place("a", 512, 7), Place("a", 512 + GAP + 8, 5), Place("b", 3, 4)]
    assert list(spans(places)) == [places[:2], places[2:3], places[3:]]
    held, reads = HeldMembers(), []

    def read(tar, offset, length):
        reads.append((tar, offset, length))
        return bytes((offset + i) % 251 for i in range(length))

    held.add([*places, places[0]], read)
    assert reads == [("a", 0, 519), ("a", 520 + GAP, 5), ("b", 3, 4)]
    assert all(held.get(m) == bytes((m.offset + i) % 251 for i in range(m.length)) for m in places)
    held.release(places)
    assert held.get(places[0]) is not None and len(held) == 1
    held.release(places)
    assert len(held) == 0


@pytest.fixture
def pairs(tmp_path):
    made_pairs(tmp_path / "pairs")
    with ShardWriter(tmp_path / "pairs/many", per_shard=9) as writer:
        for record in made_records(40):
            writer.write(record)
    return tmp_path / "pairs"


@pytest.fixture
def server(pairs, monkeypatch):
    with serving(pairs, monkeypatch) as made:
        yield made


def run_on(folder, pairs, out, *objectives, **data):
    run = made_run(pairs, out, *(objectives or ("mlm",)), batch_size=4)
    data = {"cache": False, "order": "sequential", "shuffle_buffer": 10, "val": None, **data}
    return replace(run, data=replace(run.data, train=f"{folder}/many", **data), checkpoint_every=1)


def images_of(state, batches):
    made = state.train.batches()
    return torch.cat([next(made)[0].image for _ in range(batches)])


def test_reads_are_far_fewer_than_records_and_faults_are_waited_for(server, pairs, tmp_path):
    there = start(run_on(server.url, pairs, tmp_path / "there"))
    here = start(run_on(pairs, pairs, tmp_path / "here"))
    server.count, server.faults = 0, lambda n: 503 if n == 2 else "cut" if n == 4 else None
    found = images_of(there, 20)
    # Two epochs of forty records in five tars; what was read ahead by the thread counts too.
    assert server.count <= 24 and {503, 206} <= {*server.statuses}
    assert torch.equal(found, images_of(here, 20))
    assert len(found[:40].unique(dim=0)) == 40


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_processes_change_nothing(server, pairs, tmp_path, workers):
    run = run_on(server.url, pairs, tmp_path / "a", streams=2, workers=workers)
    known = images_of(start(run_on(pairs, pairs, tmp_path / "b", streams=2)), 15)
    assert torch.equal(images_of(start(run), 15), known)


@pytest.mark.slow
@pytest.mark.parametrize("objectives", [("mlm",), ("flm", "clip"), ("moco",)])
def test_a_run_resumed_within_an_epoch_equals_an_uninterrupted_one(server, pairs, tmp_path, objectives):
    run = replace(run_on(server.url, pairs, tmp_path / "a", *objectives), steps=14)
    straight = train(replace(run, out=str(tmp_path / "b")))
    stopped_after(run, 6)
    assert_equal(weights(train(run, resume=True)), weights(straight))


def test_what_cannot_go_together_is_refused(pairs):
    data = {"train": str(pairs / "many"), "batch_size": 4, "order": "sequential"}
    with pytest.raises(UserError, match=r"`data\.group`"):
        PairData(**data, group=8)
    with pytest.raises(UserError, match=r"`data\.max_tokens`"):
        PairData(**data, max_tokens=80)
    with pytest.raises(UserError, match=r"`data\.streams` to a multiple of it, such as 3"):
        PairData(**data, workers=3)
    assert PairData(**data, workers=3, streams=6).streams == 6


def test_another_order_is_another_run(pairs, tmp_path):
    run = replace(run_on(pairs, pairs, tmp_path / "a"), steps=2)
    train(run)
    with pytest.raises(UserError, match=r"data\.shuffle_buffer: 10 then, 11 now"):
        train(replace(run, data=replace(run.data, shuffle_buffer=11)), resume=True)


def test_a_buffer_that_is_not_used_may_have_another_size(pairs, tmp_path):
    run = replace(run_on(pairs, pairs, tmp_path / "a", order="random"), steps=4)
    straight = train(replace(run, out=str(tmp_path / "b")))
    stopped_after(run, 2)
    other = replace(run, data=replace(run.data, shuffle_buffer=11, streams=3))
    assert_equal(weights(train(other, resume=True)), weights(straight))
    with pytest.raises(UserError, match=r"data\.order: random then, sequential now"):
        train(replace(other, data=replace(other.data, order="sequential"), steps=5), resume=True)


@pytest.mark.slow
@pytest.mark.parametrize(("world", "streams"), [(1, 1), (2, 2), (1, 4)])
@pytest.mark.parametrize("begin", [0, 5, 16])
def test_with_a_large_buffer_no_more_than_an_epoch_waits(world, streams, begin):
    for rank, loader in enumerate(loaders(world, streams=streams, buffer=4096)):
        small = loaders(world, streams=streams, buffer=26 * streams)[rank]
        ahead, waiting, entered = ReadAhead(loader.stored_order), [], 0
        for s in range(begin, begin + 40):
            new = ahead.before(s * world + rank)
            entered += len(new)
            waiting += new
            # An epoch of all streams of this rank, a batch that each goes on to, and a block.
            assert len(waiting) <= 26 + streams * (2 * 3 + 3 + 3)
            for row in loader.rows(s):
                waiting.remove(row.index)
            assert loader.rows(s) == small.rows(s)
        assert entered == 40 * 3 + len(waiting)


def test_held_records_are_read_from_memory(pairs):
    shards, whole = Shards(pairs / "many"), Shards(pairs / "many")
    shards.hold(range(12))
    shards._read_span = None
    assert [shards.read(i) for i in range(12)] == [whole.read(i) for i in range(12)]
    shards.release(range(12))
    assert len(shards._held) == 0


def test_a_new_tokenizer_reads_the_texts_in_few_reads(server, pairs, tmp_path):
    far, near = (run_on(place, pairs, tmp_path / "a").data for place in (server.url, pairs))
    Shards(far.train)  # makes the index, once for all processes
    server.count = 0
    assert [*far.texts()] == [*near.texts()]
    assert server.count <= 5
