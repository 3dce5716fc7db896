"""Tasks on a single stream over text and regions: what their heads read, and what a batch brings."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from fastvlp.data.loader import Row
from fastvlp.data.records.shards import Shards
from fastvlp.data.regions import RegionSource
from fastvlp.data.tokenize import Tokenizer
from fastvlp.model.sizes import tiny_single
from fastvlp.objectives.objective import combine
from fastvlp.tasks.items import encode_joined
from fastvlp.tasks.nlvr import NLVRConfig, NLVRData
from fastvlp.tasks.nlvr2 import NLVR2Config, NLVR2Data
from fastvlp.tasks.vqa import VQAConfig
from fastvlp.training.pretraining import Pretraining
from tests.made import made_tokenizer
from tests.made_single import region_batch, row_of, single_config, single_model

SIZE = tiny_single(size=32).image.size


@pytest.fixture(scope="module")
def tokenizer(world):
    return Tokenizer.train(NLVRData(train=str(world / "train"), batch_size=4).texts(), vocab_size=300)


def pair_batch():
    one = region_batch(lengths=(7, 7, 5, 5), counts=(3, 5, 2, 4))
    ids = one.ids.clone()
    ids[1::2] = ids[::2]
    return replace(one, ids=ids, slot=torch.tensor([0, 1, 0, 1]), target=torch.tensor([1, 0]))


@pytest.mark.parametrize("form", ["triplet", "pair", "pair-biattn"])
def test_every_form_learns_and_padding_changes_nothing(form):
    model, batch = single_model(), pair_batch()
    module = Pretraining(model, {"task": NLVR2Config(reading="full", form=form).build(model.config, made_tokenizer())})
    objective = module.objectives["task"]
    losses = module(batch)
    assert losses["task/label"].count == module.counts(batch)["task/label"] == 2
    combine(losses).backward()
    # The second picture's type is read too.
    for name, grad in [("kinds", model.single.kinds.grad[:3]), *((n, p.grad) for n, p in objective.named_parameters())]:
        # Attention is blind to what is added to all keys.
        if not name.endswith("kv.bias"):
            assert grad is not None and grad.abs().sum() > 0, name
    logits = objective.logits(model, module.encode_image(batch), batch)
    regions = replace(batch.regions, box=F.pad(batch.regions.box, (0, 0, 0, 2)), classes=None)
    regions = replace(regions, feature=F.pad(batch.regions.feature, (0, 0, 0, 2)))
    wide = replace(batch, ids=F.pad(batch.ids, (0, 3)), regions=regions)
    torch.testing.assert_close(objective.logits(model, module.encode_image(wide), wide), logits, atol=1e-5, rtol=1e-5)


def test_the_triplet_is_one_sequence_of_both_images():
    """The text, the left picture's regions with type 1, the right one's with type 2, and nothing between them."""
    model, batch = single_model(), pair_batch()
    objective = NLVR2Config(reading="full", form="triplet").build(model.config, made_tokenizer())
    first, second = row_of(batch, 2), row_of(batch, 3)
    feature = torch.cat([first.regions.feature, second.regions.feature], 1)
    regions = replace(
        first.regions,
        box=torch.cat([first.regions.box, second.regions.box], 1),
        count=first.regions.count + second.regions.count,
        feature=None,
        classes=None,
    )
    slot = torch.tensor([[0] * 2 + [1] * 4])
    joint = model.read_regions(feature, regions, first.ids, first.length, slot_B=slot)
    known = F.linear(joint.pooled, objective.head.weight, objective.head.bias)
    torch.testing.assert_close(objective.logits(model, batch.regions.feature, batch)[1:], known, atol=1e-5, rtol=1e-5)


def test_heads_read_the_pooled_state():
    model, batch = single_model(), region_batch(lengths=(7, 4, 9), counts=(3, 5, 1))
    pooled = model.read_regions(batch.regions.feature, batch.regions, batch.ids, batch.length).pooled
    for config, outputs in ((VQAConfig(reading="full", answers=3), 3), (NLVRConfig(reading="full"), 2)):
        objective = config.build(model.config, made_tokenizer())
        first, _, norm, last = objective.head
        assert first.weight.shape == (64, 32) and last.weight.shape == (outputs, 64)
        known = last(norm(F.gelu(first(pooled))))
        torch.testing.assert_close(objective.logits(model, batch.regions.feature, batch), known)


def test_rows_have_the_regions_of_their_own_image(world, tokenizer):
    data = NLVR2Data(train=str(world / "pairs-train"), batch_size=4, regions=RegionSource())
    made, objects = data.items("train", tokenizer, SIZE, strict=True), Shards(data.train).info(1)["objects"]
    for _ in range(2):  # decoded, then from the cache
        batch, _ = made([Row(4, 11), Row(0, 12)])
        for side in (0, 1):
            boxes = torch.tensor([o["box"] for o in objects if o["image"] == side]) / 32
            assert batch.regions.count[side] == len(boxes)
            torch.testing.assert_close(batch.regions.box[side, : len(boxes)], boxes)


def test_texts_are_joined_and_the_longest_is_cut(tokenizer):
    texts = [("a red circle", "yes", "there is a red circle in the picture"), ("a star", "no", "a star")]
    ids, length = encode_joined(tokenizer, texts, 50)
    parts = [tokenizer.encode([text], 50)[0][0].tolist() for text in texts[0]]
    assert ids[0, : length[0]].tolist() == parts[0] + parts[1][1:] + parts[2][1:]
    assert (ids[1, length[1] :] == tokenizer.pad).all()
    short, length = encode_joined(tokenizer, texts, int(length[0]) - 2)
    whole = parts[0] + parts[1][1:] + parts[2][1:-3] + parts[2][-1:]
    assert short[0].tolist() == whole and (short[0] == tokenizer.eos).sum() == 3
    one = [("a red circle",), ("a star",)]
    assert all(a.equal(b) for a, b in zip(encode_joined(tokenizer, one, 9), tokenizer.encode([t for (t,) in one], 9)))


def test_a_model_without_types_for_two_images_is_refused():
    config = single_config()
    small = replace(config, single=replace(config.single, types=2))
    with pytest.raises(Exception, match=r"set `model\.single\.types` to 3"):
        NLVR2Config(reading="full").build(small, made_tokenizer())
