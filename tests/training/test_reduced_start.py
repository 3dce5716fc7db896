"""A cheaper beginning of a run: which steps are reduced, what they see, and that the rest is as it would be."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fastvlp.errors import UserError
from fastvlp.model.encoders.vit import ViT, resize_positions
from fastvlp.model.model import VLModel
from fastvlp.model.sizes import brivl_tiny, tiny_single
from fastvlp.objectives.moco import MoCoConfig
from fastvlp.objectives.reconstruct import ReconstructConfig
from fastvlp.objectives.simclr import SimCLRConfig
from fastvlp.recipes import recipe
from fastvlp.training.checkpoint import save
from fastvlp.training.loop import start, steps, train
from fastvlp.training.reduced_start import ReducedStart, cut_texts, resize
from fastvlp.training.train_config import TrainConfig, check
from tests.made import SPECIALS, made_batch, made_config
from tests.training.runs import assert_equal, made_pairs, made_run, weights


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return made_pairs(tmp_path_factory.mktemp("pairs"))


def reduced_run(pairs, out, *objectives: str, size: int = 32, **changes) -> TrainConfig:
    """Four steps on images of 16 cells, of which the first two are reduced."""
    run = made_run(pairs, out, *(objectives or ("clip",)), steps=4)
    run = replace(run, model=replace(run.model, image=replace(run.model.image, size=size)))
    return replace(run, reduced=ReducedStart(**{"share": 0.5, "size": 16, "max_length": 5, **changes}))


def seen(run: TrainConfig, monkeypatch) -> list[tuple[int, int, int]]:
    """Returns for each step the side of the images, the number of encoded patches, and the longest text."""
    found = []
    encode = ViT.forward

    def recorded(self, image: Tensor, keep_BK: Tensor | None = None) -> Tensor:
        states = encode(self, image, keep_BK)
        found.append((image.shape[-1], states.shape[1] - 1))
        return states

    state = start(run)
    monkeypatch.setattr(ViT, "forward", recorded)
    embed, lengths = type(state.model).embed_text, []
    monkeypatch.setattr(
        VLModel, "embed_text", lambda self, ids, *rest: (lengths.append(ids.shape[1]), embed(self, ids, *rest))[1]
    )
    assert all(report.flops > 0 for report in steps(state))
    return [(*image, length) for image, length in zip(found, lengths, strict=True)]


def test_the_first_steps_see_less_and_the_others_all(pairs, tmp_path, monkeypatch):
    *_, third, fourth = shapes = seen(reduced_run(pairs, tmp_path, keep=0.5), monkeypatch)
    assert shapes[:2] == [(16, 2, 5)] * 2
    assert third[:2] == fourth[:2] == (32, 16) and min(third[2], fourth[2]) > 5


def test_a_run_without_it_is_as_before(pairs, tmp_path):
    run = reduced_run(pairs, tmp_path / "a")
    plain = train(replace(run, reduced=ReducedStart(), out=str(tmp_path / "b")))
    same = replace(run, reduced=ReducedStart(share=0.5, size=32, keep=1.0, max_length=16))
    assert_equal(weights(train(same)), weights(plain))


def test_a_resumed_run_equals_a_straight_one(pairs, tmp_path):
    straight = train(reduced_run(pairs, tmp_path / "straight", keep=0.5))
    half = reduced_run(pairs, tmp_path / "half", keep=0.5)
    state = start(half)
    loop = steps(state)
    next(loop)
    save(state)
    loop.close()
    assert_equal(weights(train(half, resume=True)), weights(straight))


def test_objectives_that_read_images_themselves_follow(pairs, tmp_path):
    run = reduced_run(pairs, tmp_path, keep=0.5)
    objectives = {
        **run.objectives,
        "simclr": SimCLRConfig(width=8, keep=0.5),
        "moco": MoCoConfig(queue=24, key_keep=0.5),
        "mae": ReconstructConfig(depth=1, width=16, heads=2),
    }
    run = replace(run, objectives=objectives, keep=0.75)
    assert [report.skipped for report in steps(start(run))] == [False] * 4


def test_smaller_images_read_positions_between_those_of_the_model():
    """As an encoder of that size with resized positions; gradients reach the whole table."""
    image = replace(made_config().image, size=32)
    model, smaller = ViT(image), ViT(replace(image, size=16))
    smaller.load_state_dict({**model.state_dict(), "position": resize_positions(model.position.detach(), 2, 1)})
    pixels = made_batch(lengths=(5, 5)).image
    torch.testing.assert_close(model(pixels), smaller(pixels))
    keep_BK = image.random_patches(torch.tensor([1, 2]), 0.5, pixels)
    assert keep_BK is not None and keep_BK.shape == (2, 2) and keep_BK.max() < 4
    model(pixels).square().sum().backward()
    assert model.position.grad is not None and model.position.grad.abs().sum(1).gt(0).all()


def test_images_are_resized_as_pixels():
    flat = torch.full((2, 3, 10, 10), 77, dtype=torch.uint8)
    assert torch.equal(resize(flat, 4), torch.full((2, 3, 4, 4), 77, dtype=torch.uint8))
    assert resize(flat, 10) is flat
    stripes = torch.tensor([0, 200], dtype=torch.uint8).repeat(8).expand(1, 3, 16, 16)
    # Without the filter, pixels of one stripe would be left.
    assert resize(stripes, 4)[..., 1:3].float().sub(100).abs().max() <= 10


def test_a_text_that_is_cut_ends_as_any():
    batch = made_batch(lengths=(3, 5, 9))
    cut = cut_texts(batch, 5, SPECIALS["eos"])
    assert cut.ids.shape == (3, 5) and cut.length.tolist() == [3, 5, 5]
    assert torch.equal(cut.ids[:2], batch.ids[:2, :5]) and torch.equal(cut.ids[2, :4], batch.ids[2, :4])
    assert cut.ids[2, 4] == SPECIALS["eos"]
    assert torch.equal(cut_texts(batch, 20, SPECIALS["eos"]).ids, batch.ids)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"share": 0.5}, "reduced.size"),
        ({"size": 16}, "reduced.share"),
        ({"share": 0.5, "size": 64}, "larger"),
        ({"share": 0.5, "size": 20}, "whole number"),
        ({"share": 0.5, "max_length": 1}, "max_length"),
    ],
)
def test_what_cannot_be_reduced_is_refused(pairs, tmp_path, options, field):
    run = replace(reduced_run(pairs, tmp_path), reduced=ReducedStart(**options))
    with pytest.raises(UserError, match=field):
        check(run)


@pytest.mark.parametrize("model", [tiny_single(), brivl_tiny()])
def test_regions_are_pooled_from_a_map_of_one_size(model):
    with pytest.raises(UserError, match="regions"):
        ReducedStart(share=0.5, size=24).check(model)


@pytest.mark.parametrize("name", ["clipa_photos", "reclip_photos", "flip_whole_photos", "reclip_flip_photos"])
def test_the_recipes_differ_from_clip_in_their_beginning_alone(name):
    run, clip = recipe(name), recipe("clip_photos")
    check(run)
    data = replace(clip.data, batch_size=run.data.batch_size)
    assert replace(run, reduced=ReducedStart()) == replace(clip, name=name, data=data)
    assert 0.8 <= run.reduced.share < 1
