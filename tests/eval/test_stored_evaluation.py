"""Evaluations read the states that training stored, and give the same scores."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastvlp.data.pairs import PairData
from fastvlp.data.records.shards import Shards
from fastvlp.data.state_store import StatesConfig
from fastvlp.data.states_file import StatesFile
from fastvlp.eval.embedding import embed_images, image_features
from fastvlp.eval.embedding_retrieval import evaluate_retrieval
from fastvlp.eval.encoding import MaskedEncoding, open_run, open_towers
from fastvlp.eval.split_reading import image_batches
from fastvlp.model.joint_space import unit
from fastvlp.model.sizes import joint_space, two_towers
from fastvlp.objectives.clip import CLIPConfig
from fastvlp.objectives.flm import FLMConfig
from fastvlp.objectives.itm import ITMConfig
from fastvlp.plain_json import check_sum
from fastvlp.training.loop import train
from fastvlp.training.optim import OptimConfig
from fastvlp.training.train_config import TrainConfig
from tests.made import small_model


@pytest.fixture(scope="module")
def stored_runs(world, tmp_path_factory) -> dict[str, Path]:
    """`towers` alone, whose images are stored as one state each, and `both` with fusion layers, which read all states."""
    folder = tmp_path_factory.mktemp("stored")
    towers = TrainConfig(
        name="towers",
        out=str(folder / "towers"),
        data=PairData(train=str(world / "train"), val=str(world / "val"), batch_size=8, max_length=40),
        model=two_towers(small_model(patch=8), width=16),
        objectives={"clip": CLIPConfig()},
        optim=OptimConfig(lr=1e-3),
        freeze=("image",),
        states=StatesConfig(store="always", dtype="fp32", folder=str(folder / "states")),
        steps=2,
        vocab=400,
        precision="fp32",
    )
    model = small_model(patch=8)
    both = replace(
        towers,
        name="both",
        out=str(folder / "both"),
        model=replace(model, embed=joint_space(model, width=16)),
        objectives={"clip": CLIPConfig(), "itm": ITMConfig(candidates=1), "flm": FLMConfig()},
    )
    for run in (towers, both):
        train(run)
    return {"towers": towers.folder, "both": both.folder, "states": folder / "states"}


@pytest.mark.parametrize("name", ["towers", "both"])
def test_embeddings_are_those_of_the_images(stored_runs, world, name):
    loaded = open_towers(stored_runs[name]).loaded
    assert loaded.states is not None
    shards = Shards(world / "test")
    stored = embed_images(loaded, shards)
    assert torch.equal(embed_images(replace(loaded, states=None), shards), stored)
    features = {
        states: [
            image_features(loaded.model, images) for _, images in image_batches(shards, replace(loaded, states=states))
        ]
        for states in (None, loaded.states)
    }
    assert torch.equal(torch.cat(features[None]), torch.cat(features[loaded.states]))
    number = {int(StatesFile(path).lengths()[0]) for path in stored_runs["states"].iterdir()}
    assert number == {1, 17}


def test_an_image_and_its_mirror_image_have_one_vector(stored_runs, world):
    """The mean of both, read from stored states or computed."""
    loaded = replace(open_towers(stored_runs["towers"]).loaded, mirror=True)
    shards = Shards(world / "test")
    stored = embed_images(loaded, shards)
    images = torch.cat([images.image for _, images in image_batches(shards, replace(loaded, states=None))])
    with loaded.inference():
        both = [loaded.model.embed_image(loaded.model.encode_image(x)) for x in (images, images.flip(-1))]
    torch.testing.assert_close(stored, unit(both[0] + both[1]))
    assert torch.equal(embed_images(replace(loaded, states=None), shards), stored)


def test_retrieval_and_reranking_give_the_same_scores(stored_runs, world, tmp_path):
    given = {"data": world, "split": "test", "rerank": "self", "top": 4}
    scores = evaluate_retrieval(stored_runs["both"], **given).scores
    config = stored_runs["both"] / "config.json"
    written = config.read_text()
    run = check_sum(json.loads(written))
    config.write_text(json.dumps(run | {"states": run["states"] | {"store": "never"}}))
    assert open_run(stored_runs["both"]).loaded.states is None
    assert evaluate_retrieval(stored_runs["both"], **given).scores == scores
    config.write_text(written)


def test_masked_views_need_the_images(stored_runs, world):
    loaded = open_towers(stored_runs["towers"], MaskedEncoding(keep=0.5, views=2)).loaded
    before = {*stored_runs["states"].iterdir()}
    whole = embed_images(replace(loaded, keep=1.0, views=1), Shards(world / "val"))
    assert not torch.equal(embed_images(loaded, Shards(world / "val")), whole)
    assert {*stored_runs["states"].iterdir()} == before


def test_a_run_that_trained_its_encoder_stores_nothing(runs):
    assert open_run(runs["both"]).loaded.states is None
