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
from fastvlp.data.reader import RecordReader
from fastvlp.data.records.joined import JoinedShards, joined
from fastvlp.data.records.shards import RecordError, Shards, ShardWriter
from fastvlp.data.records.transform import Transform
from fastvlp.data.row_order import MixedOrder, Mixture, exact_rows
from fastvlp.data.stored_lengths import caption_lengths
from fastvlp.data.tokenize import Tokenizer
from fastvlp.errors import UserError
from fastvlp.training.loop import start, train
from tests.training.runs import assert_equal, made_pairs, made_records, made_run, stopped_after, weights

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
        assert whole.key(i) == (part.key(own) if i < 24 else f"{web}: {part.key(own)}") and whole.info(i) == part.info(
            own
        )
        assert whole.images(i) == part.images(own) and whole.image_count(i) == 1 and whole.detected(i) == ()
    assert whole.fingerprint not in {part.fingerprint for part in parts}
    assert joined(parts[::-1]).content != whole.content
    with pytest.raises(IndexError):
        whole.key(34)


def test_unreadable_records_of_two_folders_with_the_same_keys_are_both_named(tmp_path: Path) -> None:
    for name in ("shop", "web"):
        with ShardWriter(tmp_path / name) as writer:
            for record in made_records(3):
                writer.write(replace(record, images=(b"no image",)) if record.key == "r001" else record)
    whole = joined([Shards(tmp_path / "shop"), Shards(tmp_path / "web")])
    reader = RecordReader(whole, Transform(size=8))
    kept, dropped = reader.read_each(lambda i: reader.record(i).images, range(6))
    assert len(kept) == 4
    assert [one.key for one in dropped] == ["r001", f"{tmp_path / 'web'}: r001"]


def test_errors_of_a_later_folder_name_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shop, web = folders(tmp_path)
    whole = joined([Shards(shop / "train"), Shards(web)])

    def fail(shards: Shards, i: int) -> None:
        raise RecordError(shards.key(i), "no image")

    for method in ("info", "images", "detected"):
        monkeypatch.setattr(Shards, method, fail)
        with pytest.raises(RecordError) as caught:
            getattr(whole, method)(24)
        assert (caught.value.key, caught.value.reason) == (whole.key(24), "no image")
    assert whole.key(24).startswith(f"{web}: ")


@pytest.mark.parametrize(("share", "folder"), [(0.001, "web"), (0.999, "shop/train")])
def test_a_share_of_less_than_a_row_is_refused(tmp_path: Path, share: float, folder: str) -> None:
    shop, web = folders(tmp_path)
    data = PairData(train=str(shop / "train"), batch_size=1, mix={str(web): share})
    with pytest.raises(UserError, match=rf"{tmp_path / folder} .*34 rows.*at least 1 / 34"):
        data.rows("train", Tokenizer.train(["red blue"] * 3), 8, strict=False)
    least = replace(data, mix={str(web): 1 / 34 + 1e-9})
    rows = least.rows("train", Tokenizer.train(["red blue"] * 3), 8, strict=False)
    assert rows is not None and rows.mixture is not None and MixedOrder(rows.mixture, 0).rows_S == [33, 1]


def test_mixed_folders_may_move(tmp_path: Path) -> None:
    shop, web = folders(tmp_path)
    run = made_run(shop, tmp_path / "run", "mlm", batch_size=4, steps=1)
    run = replace(run, data=replace(run.data, mix={str(web): 0.25}))
    train(run)
    web.rename(tmp_path / "moved")
    moved = replace(run, data=replace(run.data, mix={str(tmp_path / "moved"): 0.25}))
    assert start(moved, resume=True).changed == {}
    with pytest.raises(UserError, match=r"data\.mix.*moved"):
        start(replace(moved, data=replace(moved.data, mix={str(tmp_path / "moved"): 0.5})), resume=True)
    with ShardWriter(tmp_path / "other") as writer:
        for record in made_records(10, seed=8):
            writer.write(record)
    with pytest.raises(UserError, match=r"data\.train: .*/shop/train "):
        start(replace(moved, data=replace(moved.data, mix={str(tmp_path / "other"): 0.25})), resume=True)


def test_a_resumed_mixed_run_equals_a_straight_one(tmp_path: Path) -> None:
    shop, web = folders(tmp_path)
    run = made_run(shop, tmp_path / "straight", "mlm", batch_size=4)
    run = replace(run, data=replace(run.data, mix={str(web): 0.25}))
    straight = train(run)
    half = replace(run, out=str(tmp_path / "half"))
    stopped_after(half, 3)
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
        ({"mix": {"shop": 0.5}}, "names shop, which"),
        ({"mix": {"web": 0.5}, "order": "sequential"}, "sequential"),
    ],
)
def test_mistakes(options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        PairData(train="shop", batch_size=1, **options)


def test_neighbours_of_one_data_set_are_read_in_one_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shop, web = folders(tmp_path)
    parts = [Shards(shop / "train"), Shards(web)]
    held: list[tuple[str, list[int]]] = []
    monkeypatch.setattr(Shards, "hold", lambda self, records: held.append((self.url, list(records))))
    first = len(parts[0])
    joined(parts).hold([first - 2, first - 1, first, first + 1])
    assert held == [(parts[0].url, [first - 2, first - 1]), (parts[1].url, [0, 1])]
