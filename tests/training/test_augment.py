"""Augmentation in training: what is seen, by whom, and that seeds alone decide it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fastvlp.data.augment import AugmentConfig, augment
from fastvlp.objectives.mlm import MLMConfig
from fastvlp.objectives.region import MRFRConfig
from fastvlp.training.loop import start, steps, validate
from fastvlp.training.pretraining import Pretraining, augmented
from tests.made import made_tokenizer
from tests.made_single import region_batch, single_model
from tests.training.runs import assert_equal, made_pairs, made_run, weights

CROP = AugmentConfig(crop=(0.3, 0.6), flip=0.5)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return made_pairs(tmp_path_factory.mktemp("pairs"))


def watched(state) -> list[torch.Tensor]:
    """The images that the tower is given from now on."""
    seen: list[torch.Tensor] = []
    state.model.image.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    return seen


def test_training_sees_other_images_and_validation_those_that_are_there(pairs, tmp_path):
    state = start(made_run(pairs, tmp_path, "mlm", augment=CROP))
    seen = watched(state)
    next(steps(state))
    batch, _ = next(state.train.batches())
    assert torch.equal(seen.pop(), augment(batch.image, batch.seed, CROP)[0]) and not seen
    validate(state)
    plain = [batch.image for batch, _ in state.val.once()]
    assert len(seen) == len(plain) and all(map(torch.equal, seen, plain))


def test_nothing_is_augmented_unless_asked(pairs, tmp_path):
    state = start(made_run(pairs, tmp_path, "mlm"))
    seen = watched(state)
    next(steps(state))
    batch, _ = next(state.train.batches())
    assert torch.equal(seen[0], batch.image) and augmented(batch, state.run.augment) is batch


@pytest.mark.parametrize("names", [("clip",), ("mlm", "clip", "simclr")], ids="-".join)
def test_micro_batches_equal_one_batch(pairs, tmp_path, names):
    """Each image is shown once a step: both passes of the gradient cache see the same."""
    options = {"augment": CROP, "keep": 0.5, "steps": 3}
    whole, parts = (
        start(made_run(pairs, tmp_path / str(n), *names, batch_size=12 // n, accumulate=n, **options)) for n in (1, 3)
    )
    for one, three in zip(steps(whole), steps(parts)):
        assert one.losses == pytest.approx(three.losses, abs=1e-5)
    assert_equal(weights(whole), weights(parts), 1e-6)


def test_boxes_move_along_and_the_plain_image_stays():
    batch = region_batch(lengths=(9, 4, 7), counts=(5, 3, 6))
    shown = augmented(batch, CROP)
    image, box = augment(batch.image, batch.seed, CROP, batch.regions.box)
    assert torch.equal(shown.image, image) and torch.equal(shown.regions.box, box)
    assert torch.equal(shown.plain, batch.image) and not torch.equal(box, batch.regions.box)
    for name in ("count", "feature", "classes"):
        assert torch.equal(getattr(shown.regions, name), getattr(batch.regions, name))


def test_counts_are_of_the_regions_that_a_crop_leaves():
    batch = augmented(region_batch(lengths=(9, 4, 7, 6), counts=(5, 3, 6, 2)), AugmentConfig(crop=(0.05, 0.1)))
    assert batch.regions.mask.sum() < batch.regions.count.sum()
    model, configs = single_model(), {"mrfr": MRFRConfig(rate=0.5), "mlm": MLMConfig(mask_rate=0.4)}
    module = Pretraining(model, {n: config.build(model.config, made_tokenizer()) for n, config in configs.items()})
    losses, counts = module(batch), module.counts(batch)
    assert {name: int(loss.count) for name, loss in losses.items()} == {n: int(count) for n, count in counts.items()}


def test_a_batch_without_regions_has_none():
    batch = replace(region_batch(lengths=(9, 4), counts=(5, 3)), regions=None)
    assert augmented(batch, CROP).regions is None
