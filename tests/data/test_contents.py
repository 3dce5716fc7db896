"""Hashes of texts and images: one image alone has the hash that it has in a batch, and is hashed once in a run."""

from __future__ import annotations

import pickle
from dataclasses import replace

import pytest
import torch

from fastvlp.batch import Record
from fastvlp.data import contents as module
from fastvlp.data.augment import AugmentConfig, is_mirrored
from fastvlp.data.contents import ImageHashes, hash_one, hash_rows, image_hashes
from fastvlp.data.loader import Row
from fastvlp.data.records.shards import ShardWriter
from fastvlp.data.state_store import StatesConfig
from fastvlp.objectives.equal_pairs import contents
from fastvlp.random import hash64
from fastvlp.training.loop import start, steps, validate
from tests.training.runs import made_pairs, made_records, made_run


@pytest.mark.parametrize("shape", [(3, 16, 16), (3, 5, 5), (1,), (7, 3), (0, 4)])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.float32])
def test_one_row_has_the_hash_that_it_has_in_a_batch(shape, dtype):
    x = torch.randint(0, 256, (3, *shape)).to(dtype)
    assert [hash_one(row) for row in x] == hash_rows(x).tolist()


def test_an_image_keeps_its_first_hash_and_features_count():
    hashes, images, features = ImageHashes(2), torch.rand(2, 4, 6), torch.rand(2, 3, 5)
    known = image_hashes(images, features, torch.tensor([3, 3])).tolist()
    assert [hashes(i, images[i], features[i]) for i in range(2)] == known
    assert hashes(0, images[1], features[1]) == known[0]
    assert hash_one(images[0]) != known[0]
    again = pickle.loads(pickle.dumps(hashes))
    assert again(0, images[1]) == hash_one(images[1])


def test_batches_of_a_contrastive_run_bring_their_hashes_and_hash_each_image_once(tmp_path, monkeypatch):
    hashed = []
    monkeypatch.setattr(module, "hash_one", lambda x: hashed.append(0) or hash_one(x))
    run = made_run(made_pairs(tmp_path / "pairs", copies=True), tmp_path / "run", "clip")
    state = start(run)
    for loader in (state.train, state.val):
        for batch, _ in loader.once():
            assert torch.equal(batch.content, contents(replace(batch, content=None)))
    assert len(hashed) == 24 + 6
    assert [report.equal_pairs is None for report in steps(state)] == [False] * 6
    validate(state)
    assert len(hashed) == 24 + 6


def test_nothing_is_hashed_where_no_objective_contrasts_rows(tmp_path):
    state = start(made_run(made_pairs(tmp_path / "pairs"), tmp_path / "run", "mlm"))
    assert next(state.train.once())[0].content is None


def test_a_mirrored_image_is_equal_to_itself(tmp_path):
    """Stored states of mirrored images are others, and the picture is the same."""
    records = made_records(24)
    with ShardWriter(tmp_path / "pairs/train") as writer:
        for record in records:
            writer.write(Record(key=record.key, images=records[0].images, info=record.info))
    run = made_run(tmp_path / "pairs", tmp_path / "run", "clip")
    run = replace(run, data=replace(run.data, val=None), freeze=("image",), augment=AugmentConfig(flip=0.5))
    state = start(replace(run, states=StatesConfig(store="always")))
    seeds = [hash64(i) for i in range(8)]
    batch, _ = state.train.make([Row(i, seed) for i, seed in enumerate(seeds)])
    assert 0 < sum(is_mirrored(seed, 0.5) for seed in seeds) < 8
    assert len(batch.image.unique(dim=0)) == 2 and len(batch.content[:, 1].unique()) == 1
