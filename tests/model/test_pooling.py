"""Regions pooled from a map: what a sample is, which rule places it, and what a region may depend on."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastvlp.batch import Regions
from fastvlp.data.regions import grid_boxes
from fastvlp.errors import UserError
from fastvlp.model.joint_space import EmbedConfig, HeadConfig
from fastvlp.model.layers import LayerConfig
from fastvlp.model.model import VLModel
from fastvlp.model.region_pooling import RegionPool, box_weights
from tests.made import made_batch, made_config

CELLS = 5
BOXES = torch.tensor([[[0.1, 0.2, 0.7, 0.9], [0.0, 0.0, 1.0, 1.0], [0.4, 0.4, 0.4, 0.4]]], dtype=torch.float64)


def made_map() -> Tensor:
    return torch.randn(1, 3, CELLS, CELLS, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("place", "align"), [("released", False), ("corners", True)])
def test_weights_equal_grid_sample_under_a_matrix_for_aligned_corners(place, align):
    pixels = made_map().requires_grad_()
    known = []
    for x0, y0, x1, y1 in (BOXES[0] * CELLS).tolist():
        across = [(x1 - x0) / (CELLS - 1), 0, (x0 + x1 - CELLS + 1) / (CELLS - 1)]
        down = [0, (y1 - y0) / (CELLS - 1), (y0 + y1 - CELLS + 1) / (CELLS - 1)]
        matrix = torch.tensor([[across, down]], dtype=torch.float64)
        grid = F.affine_grid(matrix, [1, 1, 4, 4], align_corners=align)
        known.append(F.grid_sample(pixels, grid, align_corners=align).mean((2, 3)))
    mine, known = box_weights(BOXES, CELLS, RegionPool(place=place)) @ pixels.flatten(2).mT, torch.stack(known, 1)
    torch.testing.assert_close(mine, known)
    torch.testing.assert_close(*(torch.autograd.grad(x.square().sum(), pixels)[0] for x in (mine, known)))


def test_exact_samples_lie_within_the_box():
    """On a map that holds each cell's own position, a box that keeps half a cell from the edge reads its own middle."""
    middle = (torch.arange(CELLS, dtype=torch.float64) + 0.5) / CELLS
    states = torch.stack([middle.repeat(CELLS), middle.repeat_interleave(CELLS)], 1)
    box = torch.tensor([[0.1, 0.2, 0.5, 0.6], [0.35, 0.2, 0.45, 0.3]], dtype=torch.float64)
    wanted = (box[:, :2] + box[:, 2:]) / 2
    torch.testing.assert_close(box_weights(box, CELLS, RegionPool(place="exact")) @ states, wanted)
    for place in ("released", "corners"):
        assert ((box_weights(box, CELLS, RegionPool(place=place)) @ states - wanted) > 0.01).all()


def test_an_exact_sample_is_on_the_map_and_a_released_one_may_be_off_it():
    """At least half a cell from the edge along each axis; as released, all samples of a box may be zero."""
    low = torch.rand(500, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    box = torch.cat([low, low + (1 - low) * low.flip(0)], 1)
    seen = {place: box_weights(box, CELLS, RegionPool(place=place)).sum(-1) for place in ("exact", "released")}
    assert seen["exact"].min() > 0.25 and seen["exact"].max() <= 1 + 1e-9
    assert seen["released"].min() == 0


def test_the_cells_of_a_grid_that_fits_the_map_are_the_map():
    weight = box_weights(grid_boxes(CELLS), CELLS, RegionPool(place="exact", samples=1))
    columns = torch.eye(CELLS**2).reshape(CELLS, CELLS, -1).transpose(0, 1).flatten(0, 1)
    torch.testing.assert_close(weight[:-1], columns, rtol=0, atol=1e-6)


def brivl(grid: int | None = None, class_token: bool = True, place: str = "released") -> VLModel:
    torch.manual_seed(0)
    layer = LayerConfig(width=24, heads=4, hidden=32, norm="post", activation="relu")
    head = {"pool": "mean", "hidden": 20, "bias": True, "depth": 2}
    config = made_config()
    embed = EmbedConfig(
        width=12,
        image=HeadConfig(**head, regions=RegionPool(grid=grid, place=place), layer=layer),
        text=HeadConfig(**head, layer=replace(layer, width=config.text.layer.width)),
        text_mask="full",
    )
    image = replace(config.image, class_token=class_token)
    return VLModel(replace(config, fusion=None, reconstructor=None, image=image, embed=embed)).eval()


def regions(*counts: int) -> Regions:
    draw = torch.rand(len(counts), max(counts), 4, generator=torch.Generator().manual_seed(1)) / 2
    box = torch.cat([draw[..., :2], draw[..., 2:] + 0.5], -1)
    count = torch.tensor(counts)
    return Regions(box=box * (torch.arange(max(counts)) < count[:, None])[..., None], count=count)


def test_an_image_is_its_regions_whatever_pads_them_or_comes_first():
    model, batch, boxes = brivl(), made_batch(lengths=(4, 4)), regions(2, 4)
    with torch.no_grad():
        states = model.encode_image(batch.image)
        vector = model.embed_image(states, boxes)
        alone = model.embed_image(states[:1], Regions(box=boxes.box[:1, :2], count=boxes.count[:1]))
        torch.testing.assert_close(vector[:1], alone)
        swapped = replace(boxes, box=boxes.box[:, [1, 0, 3, 2]])
        torch.testing.assert_close(model.embed_image(states, swapped), vector)
        hidden = replace(boxes, box=boxes.box.clone())
        hidden.box[1, 1] = 0.0  # what a crop left behind, amid the others
        three = Regions(box=boxes.box[1:, [0, 2, 3]], count=torch.tensor([3]))
        torch.testing.assert_close(model.embed_image(states, hidden)[1:], model.embed_image(states[1:], three))
        none = Regions(box=torch.zeros(2, 3, 4), count=torch.zeros(2, dtype=torch.long))
        assert torch.isfinite(model.embed_image(states, none)).all()
    torch.testing.assert_close(vector.norm(dim=1), torch.ones(2))


def test_a_grid_needs_no_boxes_and_the_class_token_is_no_cell():
    batch = made_batch(lengths=(4, 4))
    with torch.no_grad():
        model = brivl(grid=3)
        box = grid_boxes(3).expand(2, -1, -1)
        states, boxes = model.encode_image(batch.image), Regions(box=box, count=torch.tensor([10, 10]))
        vector = model.embed_image(states)
        torch.testing.assert_close(vector, model.embed_image(states, regions(1, 1)))
        bare = brivl(class_token=False)
        bare.embed.load_state_dict(model.embed.state_dict())
        torch.testing.assert_close(vector, bare.embed_image(states[:, 1:], boxes))


def test_dropped_patches_and_missing_boxes_are_refused():
    model, batch = brivl(), made_batch(lengths=(4, 4))
    keep = torch.tensor([[0, 2], [1, 3]])
    with pytest.raises(UserError, match=r"map of 4 patches, of which 2 .*`keep`"):
        model.embed_image(model.encode_image(batch.image, keep), regions(1, 1))
    with pytest.raises(UserError, match=r"data\.regions"):
        model.embed_image(model.encode_image(batch.image))


@pytest.mark.parametrize(
    ("side", "changes", "message"),
    [
        ("text", {"regions": RegionPool()}, r"model\.embed\.text\.regions"),
        ("image", {"pool": "first"}, r"embed\.image\.regions.*pool mean"),
        ("image", {"regions": RegionPool(grid=0)}, "grid 0"),
        ("image", {"layer": None}, r"model\.embed\.image\.depth` is 2.*model\.embed\.image\.layer"),
        ("image", {"regions": None}, r"model\.embed\.image\.layer\.width` 24 .*32"),
        ("text", {"layer": LayerConfig(width=32, heads=5, hidden=8)}, "does not divide into 5 heads"),
    ],
)
def test_heads_that_do_not_fit_are_refused(side, changes, message):
    config = brivl().config
    head = replace(getattr(config.embed, side), **changes)
    with pytest.raises(UserError, match=message):
        VLModel(replace(config, embed=replace(config.embed, **{side: head})))


def test_a_head_attends_to_unit_vectors():
    """So that the size of a state does not matter, and a text's padding neither."""
    model, batch = brivl(), made_batch(lengths=(5, 9))
    head = model.embed.text
    states = torch.randn(2, 9, 32)
    with torch.no_grad():
        vector = head(states, batch.length)
        torch.testing.assert_close(head(states * 7, batch.length), vector)
        torch.testing.assert_close(head(states[:1, :5], batch.length[:1]), vector[:1])
        x = F.normalize(states[:1, :5], dim=-1)
        for block in head.blocks:
            x = block(x)
        torch.testing.assert_close(F.normalize(head.out(head.hidden(x.mean(1)).relu())), vector[:1])


def test_cells_of_a_grid_do_not_keep_the_default_device_of_their_first_use():
    """A loaded model is made without memory first, and then in earnest."""
    side = 11
    with torch.device("meta"):
        grid_boxes(side)
    assert grid_boxes(side).device.type == "cpu"
