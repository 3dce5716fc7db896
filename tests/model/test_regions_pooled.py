"""Regions pooled from an image tower that is trained along, in one stream with words."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fastvlp.batch import Batch
from fastvlp.data.regions import grid_boxes
from fastvlp.errors import UserError
from fastvlp.model.encoders.vit import ViTConfig
from fastvlp.model.layers import LayerConfig
from fastvlp.model.model import ModelConfig, VLModel
from fastvlp.model.region_embedding import RegionConfig
from fastvlp.model.sizes import single_over_patches
from fastvlp.objectives.mlm import MLMConfig
from fastvlp.objectives.region import MRFRConfig
from fastvlp.recipes.uniter_end2end import uniter_end2end
from fastvlp.training.flops import Flops
from fastvlp.training.pretraining import Pretraining
from tests.made import made_config, made_tokenizer
from tests.made_single import region_batch, single_config

WIDTH = 8


def pooling_config(pool: int | None = 2, **regions) -> ModelConfig:
    config = single_config()
    image = ViTConfig(size=16, patch=4, depth=1, layer=LayerConfig(width=WIDTH, heads=2, hidden=16))
    source = RegionConfig(**{"feature": WIDTH, "pool": pool, **regions})
    return replace(config, image=image, single=replace(config.single, regions=source))


def pooling_model(**options) -> VLModel:
    torch.manual_seed(0)
    model = VLModel(pooling_config(**options)).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def gridded(batch: Batch, side: int) -> Batch:
    """The same images with a grid of boxes, as `RegionSource(grid=side)` brings it, and nothing else of regions."""
    box = grid_boxes(side).expand(len(batch), -1, -1)
    count = torch.full((len(batch),), side**2 + 1)
    return replace(batch, regions=replace(batch.regions, box=box, count=count, feature=None, classes=None))


def made() -> Batch:
    batch = region_batch(lengths=(6, 9, 4), counts=(2, 2, 2))
    return replace(batch, image=(batch.image.double() / 128 - 1))


def test_a_region_is_the_mean_of_the_towers_map_in_its_box():
    """Two samples a side lie in the middles of 2 x 2 patches of a grid of 2, and see each whole."""
    model, batch = pooling_model(), gridded(made(), 2)
    feature = model.encode_image(batch.image, regions=batch.regions)
    states = model.image(batch.image)[:, 1:].unflatten(1, (4, 4))
    left, low = states[:, :, :2], states[:, 2:, :2]
    torch.testing.assert_close(feature[:, 1], low.mean((1, 2)), rtol=0, atol=1e-6)
    torch.testing.assert_close(feature[:, :2].mean(1), left.mean((1, 2)), rtol=0, atol=1e-6)
    assert feature.shape == (3, 5, WIDTH)


def test_the_image_tower_learns_from_the_words():
    """By what each of two pixels' changes do to the loss, against its gradient."""
    model, batch = pooling_model(), gridded(made(), 3)
    objective = MLMConfig(mask_rate=0.5, whole_word=False).build(model.config, made_tokenizer()).double()

    def loss(image: torch.Tensor) -> torch.Tensor:
        shown = replace(batch, image=image)
        (loss,) = objective(model, model.encode_image(image, regions=batch.regions), shown).values()
        return loss.total

    image = batch.image.clone().requires_grad_()
    model.zero_grad()
    loss(image).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.image.parameters())
    step = 1e-5
    for place in ((0, 0, 3, 5), (2, 1, 10, 14)):
        moved = torch.zeros_like(batch.image)
        moved[place] = step
        slope = (loss(batch.image + moved) - loss(batch.image - moved)) / (2 * step)
        torch.testing.assert_close(image.grad[place], slope.detach(), rtol=1e-4, atol=1e-7)


def test_targets_of_hidden_regions_do_not_train_the_image_encoder():
    """With all regions hidden the tower meets the loss as its target alone."""
    model, batch = pooling_model(), gridded(made(), 2)
    for rate, learns in ((1.0, False), (0.3, True)):
        objective = MRFRConfig(rate=rate).build(model.config, made_tokenizer()).double()
        model.zero_grad()
        (loss,) = objective(model, model.encode_image(batch.image, regions=batch.regions), batch).values()
        loss.total.backward()
        assert any(p.grad is not None and p.grad.any() for p in model.image.parameters()) == learns


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"feature": WIDTH + 1}, r"model\.single\.regions\.feature` 9 .*8"),
        ({"pool": 0}, r"model\.single\.regions\.pool.*1 or more"),
        ({"crop": 4}, r"model\.single\.regions\.pool.*crop"),
    ],
)
def test_settings_that_do_not_fit_are_refused(bad, message):
    with pytest.raises(UserError, match=message):
        VLModel(pooling_config(**bad))


def test_boxes_and_whole_images_are_needed():
    model, batch = pooling_model(), made()
    with pytest.raises(UserError, match=r"data\.regions"):
        model.encode_image(batch.image)
    with pytest.raises(UserError, match="`keep`"):
        model.encode_image(batch.image, torch.zeros(3, 2, dtype=torch.int64), batch.regions)


def test_there_is_an_image_encoder_only_where_regions_are_pooled():
    with_tower, without = VLModel(pooling_config()), VLModel(pooling_config(None))
    assert not [name for name in without.state_dict() if name.startswith("image.")]
    batch = gridded(replace(made(), image=made().image.float()), 2)
    with torch.no_grad(), Flops() as both:
        with_tower.encode_image(batch.image, regions=batch.regions)
    with torch.no_grad(), Flops() as tower:
        with_tower.image(batch.image)
    features = torch.zeros(3, 5, WIDTH)
    with torch.no_grad(), Flops() as none:
        without.encode_image(batch.image, regions=replace(batch.regions, feature=features))
    assert both.total >= tower.total > 0 == none.total


def test_the_recipe_trains_all_of_its_model():
    run, config = uniter_end2end(), single_over_patches(made_config(reconstructor=False))
    built = {name: objective.build(config, made_tokenizer()) for name, objective in run.objectives.items()}
    pretraining = Pretraining(VLModel(config), built)
    batch = gridded(region_batch(lengths=(6, 9, 4, 7), counts=(2, 2, 2, 2)), run.data.regions.grid)
    losses = pretraining(batch)
    assert losses.keys() == {"itm/match", "itm/align", "mlm/masked", "mrfr/masked"}
    torch.stack([loss.total / loss.count for loss in losses.values()]).sum().backward()
    still = [name for name, p in pretraining.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not still
