"""Grouped batches: every row once, the same batches however many ranks and workers, little padding, a budget that holds."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastvlp.batch import Batch, Dropped, Record
from fastvlp.data.batching import Grouping, Lengths, Plan, avoid_single_row, budget_sizes
from fastvlp.data.loader import Loader, Row
from fastvlp.data.pairs import PairData, PairMaker
from fastvlp.data.records.shards import Shards, ShardWriter
from fastvlp.data.records.transform import Transform
from fastvlp.data.regions import RegionSource
from fastvlp.data.stored_lengths import caption_lengths
from fastvlp.data.tokenize import Tokenizer
from fastvlp.data.world.corpus import WorldConfig, scene_record
from fastvlp.errors import UserError
from fastvlp.random import hash64
from fastvlp.training.loop import train
from tests.made import made_config
from tests.training.runs import assert_equal, made_run, stopped_after, weights

FIXED, BUDGET = Grouping(group=24), Grouping(group=40, max_tokens=90, multiple=2)
RECORDS = 128


def made_lengths(count: int, texts: int = 3) -> Lengths:
    generator = torch.Generator().manual_seed(count)
    tokens = torch.randint(3, 31, (count * texts,), generator=generator)
    return Lengths(tokens.numpy(), np.arange(count + 1) * texts)


def uniter_lengths(count: int) -> Lengths:
    """Words and their two specials beside the regions of a detector, as UNITER's data has them."""
    generator = torch.Generator().manual_seed(0)
    boxes = (36 + 16 * torch.randn(count, generator=generator)).round().clamp(10, 100)
    text = (11.5 + 3.5 * torch.randn(count, generator=generator)).round().clamp(min=1)
    return Lengths((boxes + text + 2).long().numpy(), np.arange(count + 1))


def make(rows: list[Row]) -> tuple[Batch, list[Dropped]]:
    index = torch.tensor([[row.index] for row in rows])
    seed = torch.tensor([row.seed for row in rows])
    return Batch(image=torch.zeros(len(rows), 3, 2, 2), ids=index, length=torch.ones_like(seed), seed=seed), []


def loader(grouping: Grouping, count: int = 103, batch_size: int = 4, seed: int = 1, **options) -> Loader:
    lengths = made_lengths(count)
    return Loader(count, make, batch_size=batch_size, seed=seed, grouping=grouping, lengths=lambda: lengths, **options)


def tokens(rows: list[Row], lengths: Lengths) -> list[int]:
    return lengths(torch.tensor([row.index for row in rows]), torch.tensor([row.seed for row in rows])).tolist()


def padding(made: Loader, batches: int) -> float:
    assert made.lengths is not None
    shown = [tokens(made.rows(s), made.lengths()) for s in range(batches)]
    return 1 - sum(map(sum, shown)) / sum(len(row) * max(row) for row in shown)


def test_a_budget_ends_an_epoch_with_each_record_shown_once():
    made = loader(BUDGET)
    s = 0
    for epoch in range(4):
        rows: list[Row] = []
        while len(rows) < 103:
            rows += made.rows(s)
            s += 1
        assert sorted(rows) == [Row(i, hash64(1, epoch, i)) for i in range(103)]
        if epoch == 0:
            assert s == made.plan.epoch()


@pytest.mark.parametrize("count", [5, 8, 103, 480])
def test_fixed_rows_show_every_record_once_before_the_next_epoch_but_for_a_straddling_bucket(count):
    made = loader(FIXED, count)
    assert made.plan.epoch() == count / 4
    rows = [row for s in range(4 * count) for row in made.rows(s)]
    assert Counter(rows).most_common(1)[0][1] == 1
    # Sixteen epochs: each row of the first fifteen is there, and no row comes more than a bucket early.
    assert {Row(i, hash64(1, e, i)) for e in range(15) for i in range(count)} <= {*rows}
    for place, row in enumerate(rows):
        assert row.seed in {
            hash64(1, e, row.index) for e in range(max(0, (place - 24) // count), (place + 24) // count + 1)
        }


@pytest.mark.parametrize("grouping", [FIXED, BUDGET])
def test_batches_are_sorted_together_and_then_shuffled(grouping):
    made = loader(grouping, 480)
    longest = [max(tokens(made.rows(s), made.lengths())) for s in range(12)]
    assert longest != sorted(longest, reverse=True)
    assert padding(made, 100) < 0.5 * padding(Loader(480, make, batch_size=4, seed=1, lengths=made.lengths), 100)
    assert made.rows(3) == loader(grouping, 480).rows(3) != loader(grouping, 480, seed=2).rows(3)


@pytest.mark.parametrize("world", [2, 3])
def test_the_ranks_together_are_one_rank_with_the_global_batch_or_with_more_accumulation(world):
    whole = loader(FIXED, batch_size=4 * world)
    parts = [loader(FIXED, rank=r, world=world) for r in range(world)]
    for s in range(40):
        assert whole.rows(s) == [row for part in parts for row in part.rows(s)]
    whole, parts = loader(BUDGET), [loader(BUDGET, rank=r, world=world) for r in range(world)]
    for s in range(40):
        assert [whole.rows(s * world + r) for r in range(world)] == [part.rows(s) for part in parts]


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("grouping", [FIXED, BUDGET])
def test_resuming_at_any_batch_continues_the_straight_run_with_any_workers(grouping, workers):
    seen = [batch.seed.tolist() for batch, _ in itertools.islice(loader(grouping).batches(), 30)]
    for first in (0, 1, 17, 29):
        again = itertools.islice(loader(grouping, workers=workers).batches(first), 30 - first)
        assert [batch.seed.tolist() for batch, _ in again] == seen[first:]


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=200),
    st.integers(50, 400),
    st.sampled_from([1, 2, 8]),
    st.booleans(),
)
def test_no_batch_exceeds_its_budget_and_no_larger_one_would_fit(lengths, budget, multiple, reset):
    lengths = torch.tensor(sorted(lengths, reverse=True))
    sizes = budget_sizes(lengths, budget, multiple=multiple, reset_longest=reset)
    batches = lengths.split(sizes)
    assert all(size > 0 for size in sizes)
    for batch in batches:
        assert len(batch) * batch[0] <= budget
    for batch in batches[:-1]:
        assert len(batch) % multiple == 0 or len(batch) < multiple
        fits = budget // int(batch[0] if reset else lengths[0])
        assert fits - multiple < len(batch) <= fits


@pytest.mark.parametrize(
    ("sizes", "wanted"),
    [
        ([8, 8, 1], [8, 7, 2]),
        ([3, 1], [2, 2]),
        ([8, 2], [8, 2]),
        ([2, 1], [2, 1]),
        ([1, 1], [1, 1]),
        ([1], [1]),
        ([], []),
    ],
)
def test_no_row_is_left_alone(sizes, wanted):
    assert avoid_single_row(sizes) == wanted


def test_the_last_batch_of_a_bucket_has_negatives():
    """Nine rows of ten tokens in batches of at most four: 4, 4 and 1 would be an error of ITM, not of the data."""
    lengths, grouping = Lengths(np.full(9, 10), np.arange(10)), Grouping(group=9, max_tokens=40, multiple=2)
    made = Loader(9, make, batch_size=1, seed=0, grouping=grouping, lengths=lambda: lengths)
    batches = made.batches()
    assert sorted(len(next(batches)[0]) for _ in range(3)) == [2, 3, 4]


@pytest.mark.parametrize(("max_tokens", "fill"), [(10240, 0.434), (6144, 0.41)])
def test_the_released_running_maximum_leaves_more_than_half_of_the_budget_unused(max_tokens, fill):
    """UNITER's sampler on 200,000 such rows: 43.4 % and 1.2 % padding at 10,240 tokens (specs, A3.1)."""
    shares = {}
    lengths = uniter_lengths(40_000)
    for reset in (False, True):
        grouping = Grouping(group=8192, max_tokens=max_tokens, reset_longest=reset)
        made = Loader(40_000, make, batch_size=1, seed=0, grouping=grouping, lengths=lambda: lengths)
        batches = int(made.plan.epoch())
        shares[reset] = int(lengths.tokens_T.sum()) / batches / max_tokens, padding(made, batches // 4)
    assert shares[False] == (pytest.approx(fill, abs=0.015), pytest.approx(0.01, abs=0.005))
    assert shares[True][0] > 0.93
    assert shares[True][1] < 0.025


def test_grouping_leaves_less_than_a_percent_of_padding():
    lengths = uniter_lengths(66_000)

    def made(grouping: Grouping | None) -> Loader:
        return Loader(66_000, make, batch_size=72, seed=0, grouping=grouping, lengths=lambda: lengths)

    budget = made(Grouping(max_tokens=10240))
    assert padding(budget, int(budget.plan.epoch()) // 4) < 0.01
    assert padding(made(Grouping(group=8192)), 100) < 0.01
    assert 0.4 < padding(made(None), 100) < 0.48


# --- pairs -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    for split, count in (("train", RECORDS), ("val", 8)):
        with ShardWriter(folder / split) as writer:
            for i in range(count):
                writer.write(scene_record(WorldConfig(size=16), split, i))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("captions", ["captions", "captions_zh", "captions+captions_zh"])
def test_lengths_of_pairs_are_those_of_their_batches(world, captions):
    data = PairData(train=str(world / "train"), batch_size=8, group=RECORDS, captions=captions, cache=False)
    tokenizer = Tokenizer.train(data.texts(), vocab_size=300)
    shards = Shards(data.train)
    maker = PairMaker(shards, Transform(size=8), tokenizer, captions=captions, max_length=12)
    lengths = caption_lengths(shards, tokenizer, captions, 12)
    shown = 0.0
    made = Loader(RECORDS, maker, batch_size=8, seed=0, grouping=data.grouping, lengths=lambda: lengths)
    for s in range(RECORDS // 8):
        rows = made.rows(s)
        batch, _ = maker(rows)
        assert tokens(rows, lengths) == batch.length.tolist()
        shown += int(batch.length.sum()) / batch.ids.numel() / (RECORDS // 8)
    assert shown > 0.97


@pytest.mark.parametrize("options", [{"most": 3}, {"whole": True}, {"grid": 2}])
def test_regions_fill_a_row_too(world, options):
    data = PairData(
        train=str(world / "train"), batch_size=16, max_tokens=90, regions=RegionSource(**options), cache=False
    )
    rows = data.rows("train", Tokenizer.train(data.texts()), made_config().image.size, strict=False)
    lengths = rows.lengths()
    made = Loader(RECORDS, rows.make, batch_size=16, seed=0, grouping=data.grouping, lengths=lambda: lengths)
    for s in range(10):
        batch, _ = rows.make(made.rows(s))
        row = batch.length + batch.regions.count
        assert tokens(made.rows(s), lengths) == row.tolist()
        assert len(batch) * row.max() <= 90


def test_a_record_without_a_caption_is_dropped_when_its_batch_is_made(tmp_path):
    with ShardWriter(tmp_path) as writer:
        for i, captions in enumerate((["a red dog"], [], None)):
            writer.write(Record(key=f"p{i}", images=(b"\xff\xd8",), info={"captions": captions}))
    tokenizer = Tokenizer.train(["a red dog"] * 3)
    lengths = caption_lengths(Shards(tmp_path), tokenizer, "captions", 12)
    assert lengths(torch.arange(3), torch.arange(3)).tolist() == [5, 2, 2]


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [{"group": 64}, {"max_tokens": 200}, pytest.param({"max_tokens": 200, "fill": "official"}, marks=pytest.mark.slow)],
)
def test_a_resumed_grouped_run_equals_a_straight_one(world, tmp_path, options):
    run = made_run(world, tmp_path / "straight", "mlm", batch_size=8)
    run = replace(run, data=replace(run.data, **options), accumulate=2)
    straight = train(run)
    half = replace(run, out=str(tmp_path / "half"))
    stopped_after(half, 3)
    assert_equal(weights(train(half, resume=True)), weights(straight))
    assert straight.pairs == 6 * 16 or "max_tokens" in options


# --- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1])
def test_a_row_above_the_budget_is_refused_before_training(workers):
    made = loader(Grouping(max_tokens=20), workers=workers)
    with pytest.raises(UserError, match=r"a row has 30 tokens, and `data.max_tokens` allows 20 a batch; raise it"):
        made.batches()
    assert [len(batch) for batch, _ in loader(Grouping(max_tokens=20)).once()] == [4] * 25 + [3]


@pytest.mark.parametrize("options", [{"group": 0}, {"max_tokens": -1}, {"fill": "official"}])
def test_options_that_cannot_be_grouped_by_are_refused(options):
    with pytest.raises(UserError, match=r"data\.(group|fill)"):
        PairData(train="nowhere", batch_size=1, **options)


def test_data_without_lengths_cannot_be_grouped():
    with pytest.raises(UserError, match=r"leave out `data\.group` and `data\.max_tokens`"):
        Loader(5, make, batch_size=1, seed=0, grouping=FIXED)


def test_threads_share_a_plan():
    def lengths(place_N):
        time.sleep(1e-4)  # lets the other thread in
        return place_N % 7 + 1

    def plan():
        shape = {"count": 40, "batch_size": 2, "world": 1, "seed": 0}
        return Plan(Grouping(group=8, max_tokens=14, multiple=1), lengths, 7, **shape)

    alone, shared = plan(), plan()
    expected = [(alone.place(t), alone.batch(t).tolist()) for t in range(60)]
    with ThreadPoolExecutor(2) as pool:
        places, batches = pool.map(lambda f: [f(t) for t in range(60)], (shared.place, shared.batch))
    assert [(place, batch.tolist()) for place, batch in zip(places, batches)] == expected
