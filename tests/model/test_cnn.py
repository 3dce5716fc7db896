"""A CNN as the image trunk: regions pooled from its map, and batch norms under training, freezing and a momentum copy."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fastvlp.batch import Batch, Regions
from fastvlp.model.encoders.transformers_image import TransformersImageConfig
from fastvlp.model.layers import LayerConfig
from fastvlp.model.model import ModelConfig, VLModel
from fastvlp.model.region_pooling import RegionPool
from fastvlp.model.sizes import region_heads
from fastvlp.objectives.moco import MoCoConfig
from fastvlp.objectives.objective import combine
from fastvlp.training.pretraining import Pretraining
from fastvlp.training.trained_parts import LastLayers, freeze
from tests.made import made_batch, made_config, made_tokenizer
from tests.towers.public import randomised

SIZE = 128
CNN = {"model_type": "efficientnet", "image_size": SIZE, "hidden_dim": 320, "drop_connect_rate": 0.0}
CNN |= {"width_coefficient": 0.25, "depth_coefficient": 0.25}
BOXES = [[[0.1, 0.2, 0.7, 0.9], [0.0, 0.0, 1.0, 1.0], [0.9, 0.0, 1.0, 0.05]], [[0.4, 0.4, 0.5, 0.6]] + [[0.0] * 4] * 2]


def cnn_config(**changes) -> ModelConfig:
    base = made_config()
    image = TransformersImageConfig(size=SIZE, architecture=CNN, **changes)
    config = replace(base, image=image, fusion=None, reconstructor=None)
    layer = LayerConfig(width=24, heads=4, hidden=32, norm="post", activation="relu")
    return replace(config, embed=region_heads(config, width=12, layer=layer, depth=1, grid=None))


def cnn_model(**changes) -> VLModel:
    torch.manual_seed(0)
    model = VLModel(cnn_config(**changes))
    randomised(model.image)
    return model


def made_regions() -> Regions:
    return Regions(box=torch.tensor(BOXES, dtype=torch.float64), count=torch.tensor([3, 1]))


def pooled_by_a_loop(map_DHW: Tensor, box: list[float], samples: int, place: str) -> Tensor:
    """The mean of bilinear samples of a map, whose outside is zero, in the box x0 y0 x1 y1 (fractions of the image)."""
    _, height, width = map_DHW.shape
    total = map_DHW.new_zeros(len(map_DHW))

    def sample_place(low: float, high: float, i: int, cells: int) -> float:
        at = (low + (high - low) * (i + 0.5) / samples) * cells
        return (at * cells / (cells - 1) if place == "released" else at) - 0.5

    for i in range(samples):
        for j in range(samples):
            x, y = sample_place(box[0], box[2], i, width), sample_place(box[1], box[3], j, height)
            for column in (math.floor(x), math.floor(x) + 1):
                for row in (math.floor(y), math.floor(y) + 1):
                    if 0 <= column < width and 0 <= row < height:
                        total += (1 - abs(x - column)) * (1 - abs(y - row)) * map_DHW[:, row, column]
    return total / samples**2


@pytest.mark.parametrize("place", ["exact", "released"])
def test_regions_are_samples_of_the_map_and_an_image_the_mean_of_its_real_regions(place):
    config = cnn_config()
    pool = RegionPool(samples=3, place=place)
    embed = replace(config.embed, image=replace(config.embed.image, regions=pool))
    torch.manual_seed(0)
    model = VLModel(replace(config, embed=embed)).double().eval()
    randomised(model.image)
    image, regions = torch.randn(2, 3, SIZE, SIZE, dtype=torch.float64), made_regions()
    with torch.no_grad():
        states = model.encode_image(image)
        maps = model.image.model(pixel_values=image).last_hidden_state
        head = model.embed.image
        mine, real = head.regions(states, regions)
        for row, (box_R4, count) in enumerate(zip(BOXES, regions.count.tolist())):
            known = torch.stack([pooled_by_a_loop(maps[row], box, 3, place) for box in box_R4[:count]])
            known = head.regions.project(known)
            torch.testing.assert_close(mine[row, :count], known, rtol=0, atol=1e-12)
            assert real[row].tolist() == [i < count for i in range(3)]
            # As published: unit vectors, attention, the mean over real regions, and two layers.
            # A box at the right or lower edge may lie off the map as released, and is then zero.
            x = known[None] / (known[None].norm(dim=-1, keepdim=True) + 1e-8)
            vector = head.out(head.hidden(head.blocks[0](x).mean(1)).relu())
            vector = vector / vector.norm(dim=-1, keepdim=True)
            torch.testing.assert_close(model.embed_image(states, regions)[row : row + 1], vector, rtol=0, atol=1e-7)


def statistics(model: VLModel) -> dict[str, Tensor]:
    return {name: x.clone() for name, x in model.image.named_buffers() if "running_" in name}


def trained(model: VLModel, steps: int = 1, **options) -> Pretraining:
    """Steps of BriVL in training mode, with the copy updated after each."""
    objective = MoCoConfig(queue=8, momentum=0.5, **options).build(model.config, made_tokenizer())
    objective.begin(model)
    pretraining = Pretraining(model, {"moco": objective}).train()
    regions = Regions(box=torch.tensor(BOXES), count=torch.tensor([3, 1]))
    image = torch.randint(0, 256, (2, 3, SIZE, SIZE), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    batch: Batch = replace(made_batch(lengths=(4, 6)), image=image, regions=regions)
    for _ in range(steps):
        model.zero_grad()
        combine(pretraining(batch)).backward()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter -= 0.01 * parameter.grad
        pretraining.after_step()
    return pretraining


def moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    return {name for name, x in after.items() if not torch.equal(x, before[name])}


def test_batch_norms_keep_their_statistics_in_the_trunk_and_in_the_copy_of_it():
    model = cnn_model()
    before, weight = statistics(model), model.image.model.encoder.top_conv.weight.clone()
    pretraining = trained(model)
    slow = pretraining.objectives["moco"].slow
    assert moved(before, statistics(model)) == moved(before, statistics(slow)) == set()
    # The trunk is trained, and its copy follows half of the way.
    now = model.image.model.encoder.top_conv.weight
    assert not torch.equal(now, weight)
    torch.testing.assert_close(slow.image.model.encoder.top_conv.weight, (now + weight) / 2)


def test_what_is_trained_may_update_its_statistics_and_what_is_frozen_does_not():
    model = cnn_model(fixed_statistics=False)
    freeze(model, (), LastLayers(image=2))
    before, (early, layers, _) = statistics(model), model.image.layer_names()
    frozen = tuple(f"{name}." for name in (*early, *layers[:-2]))
    pretraining = trained(model)
    slow = pretraining.objectives["moco"].slow
    assert moved(before, statistics(model)) == {name for name in before if not name.startswith(frozen)}
    assert all(torch.equal(x, statistics(slow)[name]) for name, x in statistics(model).items())
    own = dict(slow.image.named_parameters())
    shared = {name for name, p in model.image.named_parameters() if p is own[name]}
    assert shared == {name for name in own if name.startswith(frozen)}, "frozen weights are there once"
    # Or its copy has statistics of its own.
    model = cnn_model(fixed_statistics=False)
    slow = trained(model, steps=2, buffers="own").objectives["moco"].slow
    assert not all(torch.equal(x, statistics(slow)[name]) for name, x in statistics(model).items())
