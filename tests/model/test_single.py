"""The single stream: packing, what padding and order mean, masked regions, regions' own pixels, configs that cannot be."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fastvlp.batch import Batch
from fastvlp.errors import UserError
from fastvlp.model.layers import LayerConfig
from fastvlp.model.model import VLModel
from fastvlp.model.region_embedding import box_vector, crop_regions, random_hide
from fastvlp.model.single_stream import SingleStates, packing
from fastvlp.model.sizes import uniter_base, uniter_large
from fastvlp.objectives.region import MRCConfig, MRFRConfig
from tests.made import made_config
from tests.made_single import FEATURE, region_batch, row_of, single_config, single_model


def read(model: VLModel, batch: Batch, **options) -> SingleStates:
    feature = model.encode_image(batch.image, regions=batch.regions)
    return model.read_regions(feature, batch.regions, batch.ids, batch.length, **options)


def test_packing_leaves_no_gap_where_the_last_text_is_not_the_longest():
    """Rows of 3, 4 and 1 words (padded to 4) and 2, 0 and 3 regions (padded to 3), one with a hole."""
    real = torch.tensor([[1, 1, 1, 0, 1, 1, 0], [1, 1, 1, 1, 0, 0, 0], [1, 0, 0, 0, 1, 0, 1]]).bool()
    pack = packing(real)
    assert pack.source[0].tolist() == [0, 1, 2, 4, 5]
    assert pack.source[2, :3].tolist() == [0, 4, 6]
    assert pack.real.tolist() == [[True] * 5, [True] * 4 + [False], [True] * 3 + [False] * 2]
    value = torch.arange(21).view(3, 7)
    there_and_back = value.take_along_dim(pack.source, 1).take_along_dim(pack.place, 1)
    assert torch.equal(there_and_back[real], value[real])


def test_packing_pays_where_batches_are_made_by_total_length():
    """8192 rows with UNITER's lengths, in batches of 10,240 tokens."""
    generator = torch.Generator().manual_seed(0)
    words = (11.5 + 3.5 * torch.randn(8192, generator=generator)).round().clamp(3, 60).long() + 2
    regions = (36 + 16 * torch.randn(8192, generator=generator)).round().clamp(10, 100).long()
    apart = packed = 0
    order = (words + regions).argsort(descending=True)
    while len(order):
        n = max(1, 10240 // int((words + regions)[order[0]]))
        rows, order = order[:n], order[n:]
        apart += len(rows) * int(words[rows].max() + regions[rows].max())
        packed += len(rows) * int((words + regions)[rows].max())
    assert apart / packed == pytest.approx(1.33, abs=0.03)
    assert int((words + regions).sum()) / packed > 0.97


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_padding_changes_nothing(norm):
    """The packed sequence of a batch equals each row alone; padding, its words and features, is never seen."""
    model = single_model(norm=norm).double()
    batch = region_batch(lengths=(4, 9, 6, 3), counts=(5, 1, 0, 6))
    together = read(model, batch)
    junk = replace(batch.regions, feature=torch.where(batch.regions.mask[..., None], batch.regions.feature, 9.0))
    assert torch.equal(read(model, replace(batch, regions=junk)).pooled, together.pooled)
    for b in range(4):
        one = row_of(batch, b)
        alone, n, r = read(model, one), int(one.length), int(one.regions.count)
        torch.testing.assert_close(together.text[b, :n], alone.text[0])
        torch.testing.assert_close(together.region[b, :r], alone.region[0])
        torch.testing.assert_close(together.pooled[b], alone.pooled[0])


def test_regions_have_no_order_but_that_of_their_boxes():
    model, batch = single_model().double(), region_batch(lengths=(5, 5), counts=(4, 4))
    order = torch.tensor([2, 0, 3, 1])
    turned = replace(batch.regions, box=batch.regions.box[:, order], feature=batch.regions.feature[:, order])
    one, other = read(model, batch), read(model, replace(batch, regions=turned))
    torch.testing.assert_close(one.text, other.text)
    torch.testing.assert_close(one.region[:, order], other.region)


def test_a_box_of_no_area_is_no_region():
    """Wherever it stands among the others: a crop may leave any of them behind."""
    model, batch = single_model().double(), region_batch(lengths=(5,), counts=(4,))
    box = batch.regions.box.clone()
    box[0, 1] = 0
    keep = torch.tensor([0, 2, 3])
    less = replace(batch.regions, box=box[:, keep], feature=batch.regions.feature[:, keep], count=torch.tensor([3]))
    one = read(model, replace(batch, regions=replace(batch.regions, box=box)))
    other = read(model, replace(batch, regions=less))
    torch.testing.assert_close(one.pooled, other.pooled)
    torch.testing.assert_close(one.region[:, keep], other.region)


@pytest.mark.parametrize("mask", ["learned", "zero"])
def test_a_masked_region_shows_its_box_and_nothing_else(mask):
    model, batch = single_model(mask=mask).double(), region_batch(lengths=(5,), counts=(3,))
    hidden = torch.tensor([[False, True, False]])
    feature = batch.regions.feature.double().requires_grad_()
    joint = model.read_regions(feature, batch.regions, batch.ids, batch.length, hidden_BR=hidden)
    (gradient,) = torch.autograd.grad(joint.pooled.sum(), feature)
    assert not gradient[hidden].any() and gradient[~hidden].all()
    stand_in = torch.zeros(FEATURE) if mask == "zero" else model.single.regions.mask
    shown = torch.where(hidden[..., None], stand_in, feature)
    torch.testing.assert_close(joint.pooled, model.read_regions(shown, batch.regions, batch.ids, batch.length).pooled)
    moved = replace(batch.regions, box=torch.where(hidden[..., None], 0.9 * batch.regions.box, batch.regions.box))
    other = model.read_regions(feature, moved, batch.ids, batch.length, hidden_BR=hidden)
    assert (other.pooled != joint.pooled).all()


def test_the_second_picture_of_a_pair_has_its_own_type():
    model, batch = single_model(), region_batch(lengths=(5, 5), counts=(3, 2))
    first, none = read(model, batch, slot_B=torch.tensor([0, 1])), read(model, batch)
    torch.testing.assert_close(first.pooled[0], none.pooled[0])
    assert (first.pooled[1] != none.pooled[1]).all()


def test_random_hide_depends_on_the_row_alone_and_hides_at_least_one_region():
    seed, real = torch.arange(4000), torch.arange(10) < torch.tensor(10)
    hidden = random_hide(seed, real.expand(4000, 10), 0.3)
    assert hidden.float().mean().item() == pytest.approx(0.3, abs=0.01)
    assert hidden.any(1).all() and torch.equal(hidden[7:9], random_hide(seed[7:9], real.expand(2, 10), 0.3))
    few = random_hide(torch.arange(50), torch.arange(4) < torch.tensor([[0], [2]] * 25), 0.01)
    assert few.sum(1).tolist() == [0, 1] * 25


def test_box_vector():
    vector = box_vector(torch.tensor([[[0.1, 0.2, 0.5, 0.4]]]))
    torch.testing.assert_close(vector, torch.tensor([[[0.1, 0.2, 0.5, 0.4, 0.4, 0.2, 0.08]]]))


def test_a_regions_own_pixels():
    """The whole picture at its own size is the picture; a quarter is that quarter; both in -1..1."""
    image = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    box = torch.tensor([[[0.0, 0, 1, 1], [0.5, 0, 1, 0.5]]] * 2)
    whole = crop_regions(image, box, 8)[:, 0].view(2, 3, 8, 8)
    torch.testing.assert_close(whole, image.float() / 127.5 - 1)
    quarter = crop_regions(image, box, 4)[:, 1].view(2, 3, 4, 4)
    torch.testing.assert_close(quarter, image[:, :, :4, 4:].float() / 127.5 - 1)


def test_features_come_from_the_data_or_from_pixels():
    batch = region_batch(lengths=(5,), counts=(3,))
    assert single_model(crop=2).encode_image(batch.image, regions=batch.regions).shape == (1, 3, 12)
    model = single_model()
    for wrong in (None, replace(batch.regions, feature=None), replace(batch.regions, feature=torch.zeros(1, 3, 9))):
        with pytest.raises(UserError, match=r"data\.regions|model\.single\.regions"):
            model.encode_image(batch.image, regions=wrong)
    with pytest.raises(UserError, match="keep"):
        model.encode_image(batch.image, torch.zeros(1, 1, dtype=torch.long), batch.regions)


@pytest.mark.parametrize(
    ("config", "trunk", "whole"), [(uniter_base(), 109.90, 112.94), (uniter_large(), 335.70, 340.52)]
)
def test_the_papers_sizes(config, trunk, whole):
    """Million parameters, of the released code with its vocabulary."""
    vocab = 28996
    config = replace(config, text=replace(config.text, vocab=vocab))
    with torch.device("meta"):
        model = VLModel(config)
        heads = [objective.build(config, None) for objective in (MRFRConfig(), MRCConfig())]
    # Theirs keep a row of zeros beside the mask vector.
    count = lambda *parts: (2048 + sum(p.numel() for part in parts for p in part.parameters())) / 1e6  # noqa: E731
    assert count(model, *heads) == pytest.approx(whole, abs=5e-3)
    extra = sum(p.numel() for part in (model.single.words, model.single.match) for p in part.parameters()) / 1e6
    assert count(model) - extra == pytest.approx(trunk, abs=5e-3)


def test_a_single_stream_stands_alone():
    config, other = single_config(), made_config()
    narrow = replace(config.single, layer=LayerConfig(width=16, heads=4, hidden=64))
    for wrong in (
        replace(config, fusion=other.fusion),
        replace(config, text=replace(config.text, depth=1)),
        replace(config, single=narrow),
    ):
        with pytest.raises(UserError, match=r"model\.single"):
            VLModel(wrong)


def test_boxes_differ_from_the_start():
    """The place vectors of a new embedder differ more between boxes than they have in common."""
    model = VLModel(single_config())
    corner = torch.rand(512, 2, 2, generator=torch.Generator().manual_seed(0)).sort(1).values
    box = torch.cat([corner[:, 0], corner[:, 1]], 1)
    embed = model.single.regions
    place = embed.box_norm(embed.box(box_vector(box)))
    assert place.var(0).mean() > 4 * place.mean(0).square().mean()
