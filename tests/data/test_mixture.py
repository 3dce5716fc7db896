"""Data sets that are mixed: exact shares, no record twice before all were shown, and the same rows however the run is cut."""

from __future__ import annotations

import pickle
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastvlp.data.batching import Grouping
from fastvlp.data.loader import Loader, Row
from fastvlp.data.pairs import PairData
from fastvlp.data.records.joined import JoinedShards, joined
from fastvlp.data.records.shards import Shards, ShardWriter
from fastvlp.data.row_order import MixedOrder, Mixture, exact_rows
from fastvlp.data.stored_lengths import caption_lengths
from fastvlp.data.tokenize import Tokenizer
from fastvlp.errors import UserError
from fastvlp.training.checkpoint import save
from fastvlp.training.loop import start, steps, train
from tests.training.runs import assert_equal, made_pairs, made_records, made_run, weights

MIXTURE = Mixture((7, 40, 13), (0.5, 0.2, 0.3))
COUNT = 60


def rows_of(loader: Loader, batches: range) -> list[Row]:
    return [row for s in batches for row in loader.rows(s)]


def source(index: int) -> int:
    return 0 if index < 7 else 1 if index < 47 else 2


def test_each_epoch_has_the_exact_shares() -> None:
    loader = Loader(COUNT, None, batch_size=5, seed=3, mixture=MIXTURE)  # type: ignore[arg-type]
    for epoch in range(3):
        rows = rows_of(loader, range(epoch * 12, (epoch + 1) * 12))
        assert Counter(source(row.index) for row in rows) == {0: 30, 1: 12, 2: 18}
        # They are spread over the epoch.
        assert {source(row.index) for row in rows[:20]} == {0, 1, 2}


def test_no_record_comes_again_before_all_of_its_data_set_were_shown() -> None:
    loader = Loader(COUNT, None, batch_size=5, seed=3, mixture=MIXTURE)  # type: ignore[arg-type]
    rows = rows_of(loader, range(12 * 5))
    for s, (first, size) in enumerate(((0, 7), (7, 40), (47, 13))):
        own = [row.index - first for row in rows if source(row.index) == s]
        passes = [own[i : i + size] for i in range(0, len(own) - size + 1, size)]
        assert passes and all(sorted(part) == [*range(size)] for part in passes)
        assert len(passes) < 2 or passes[0] != passes[1]
    # A record that comes again has another caption and other masks.
    assert len({row.seed for row in rows}) == len(rows)


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("grouping", [None, Grouping(group=24)])
def test_ranks_share_the_batch_of_one(world: int, grouping: Grouping | None, tmp_path: Path) -> None:
    lengths = None
    if grouping is not None:
        parts = []
        for s, size in enumerate(MIXTURE.sizes):
            with ShardWriter(tmp_path / str(s)) as writer:
                for record in made_records(size, seed=s):
                    writer.write(record)
            parts.append(Shards(tmp_path / str(s)))
        table = caption_lengths(JoinedShards(parts), Tokenizer.train(["red blue"] * 3), "captions", 12)
        lengths = lambda: table  # noqa: E731
    options = {"seed": 3, "mixture": MIXTURE, "grouping": grouping, "lengths": lengths}
    whole = Loader(COUNT, None, batch_size=2 * world, **options)
    ranks = [Loader(COUNT, None, batch_size=2, rank=r, world=world, **options) for r in range(world)]
    for s in range(25):
        shared = [row for part in ranks for row in part.rows(s)]
        assert shared == whole.rows(s) if grouping is None else len(shared) == 2 * world
    later = Loader(COUNT, None, batch_size=2 * world, **options)
    assert later.rows(24) == whole.rows(24), "nothing depends on the batches before"


@pytest.mark.parametrize(
    ("shares", "count"), [((0.7, 0.3), 10), ((1 / 3, 1 / 3, 1 / 3), 100), ((0.999, 0.001), 7), ((0.1,) * 10, 13)]
)
def test_shares_are_exact_to_a_row(shares: tuple[float, ...], count: int) -> None:
    rows = exact_rows(shares, count)
    assert sum(rows) == count
    assert all(abs(part - share * count) < 1 for part, share in zip(rows, shares))


def test_the_order_of_a_place_does_not_depend_on_what_was_asked_before() -> None:
    asked = MixedOrder(MIXTURE, 1)
    places = torch.randperm(200)
    index, epoch = asked.rows(places)
    for n in (0, 57, 199):
        alone = MixedOrder(MIXTURE, 1).rows(places[n : n + 1])
        assert (int(alone[0]), int(alone[1])) == (int(index[n]), int(epoch[n]))


def folders(tmp_path: Path) -> tuple[Path, Path]:
    shop = made_pairs(tmp_path / "shop", 24)
    with ShardWriter(tmp_path / "web") as writer:
        for record in made_records(10, seed=7):
            writer.write(replace(record, key=f"web{record.key}"))
    return shop, tmp_path / "web"


def test_joined_shards_are_those_of_each_folder(tmp_path: Path) -> None:
    shop, web = folders(tmp_path)
    parts = [Shards(shop / "train"), Shards(web)]
    whole = pickle.loads(pickle.dumps(joined(parts)))
    assert len(whole) == 34 and joined(parts[:1]) is parts[0]
    for i in (0, 23, 24, 33):
        part, own = (parts[0], i) if i < 24 else (parts[1], i - 24)
        assert whole.key(i) == part.key(own) and whole.info(i) == part.info(own)
        assert whole.images(i) == part.images(own) and whole.image_count(i) == 1 and whole.detected(i) == ()
    assert whole.fingerprint not in {part.fingerprint for part in parts}
    assert joined(parts[::-1]).content != whole.content
    with pytest.raises(IndexError):
        whole.key(34)


def test_a_resumed_mixed_run_equals_a_straight_one(tmp_path: Path) -> None:
    shop, web = folders(tmp_path)
    run = made_run(shop, tmp_path / "straight", "mlm", batch_size=4)
    run = replace(run, data=replace(run.data, mix={str(web): 0.25}))
    straight = train(run)
    half = replace(run, out=str(tmp_path / "half"))
    state = start(half)
    for _ in zip(range(3), steps(state)):
        pass
    save(state)
    state.tokenizer.save(half.folder / "tokenizer.json")
    assert_equal(weights(train(half, resume=True)), weights(straight))
    with pytest.raises(UserError, match=r"data\.mix"):
        train(replace(half, data=replace(half.data, mix={str(web): 0.5})), resume=True)


def test_a_vocabulary_has_the_words_of_all_folders(tmp_path: Path) -> None:
    shop, web = folders(tmp_path)
    texts = [*PairData(train=str(shop / "train"), batch_size=1, mix={str(web): 0.1}).texts()]
    assert texts == [
        *PairData(train=str(shop / "train"), batch_size=1).texts(),
        *PairData(train=str(web), batch_size=1).texts(),
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mix": {"web": 0.6, "faces": 0.4}}, "less than 1"),
        ({"mix": {"shop": 0.5}}, "names shop too"),
        ({"mix": {"web": 0.5}, "order": "sequential"}, "sequential"),
    ],
)
def test_mistakes(options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        PairData(train="shop", batch_size=1, **options)
