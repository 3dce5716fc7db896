from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from fastvlp.batch import Record
from fastvlp.data.loader import Row
from fastvlp.data.records.shards import Shards, ShardWriter
from fastvlp.data.regions import RegionSource
from fastvlp.data.tokenize import Tokenizer
from fastvlp.data.world.corpus import WorldConfig, scene_record
from fastvlp.model.sizes import tiny_single
from fastvlp.objectives.objective import combine
from fastvlp.tasks.grounding import GroundingConfig, GroundingData, measure, overlap
from fastvlp.training.pretraining import Pretraining
from tests.golden import assert_close, load
from tests.made import made_model, made_tokenizer
from tests.made_single import region_batch, single_model

SIZE = tiny_single(size=32).image.size


@pytest.fixture(scope="module")
def tokenizer(world):
    return Tokenizer.train(GroundingData(train=str(world / "train"), batch_size=4).texts(), vocab_size=300)


def grounding_batch(chosen=(2, 0, 3)):
    batch = region_batch(lengths=(7, 4, 9), counts=(3, 1, 5))
    return replace(batch, target=batch.regions.box[torch.arange(3), torch.tensor(chosen)])


def test_overlap_is_intersection_over_union():
    box = torch.tensor([[0.0, 0, 2, 2], [0, 0, 1, 1], [0, 0, 0, 0], [0, 0, 2, 2]])
    other = torch.tensor([[1.0, 1, 3, 3], [2, 2, 3, 3], [0, 0, 0, 0], [0, 0, 2, 1]])
    torch.testing.assert_close(overlap(box, other), torch.tensor([1 / 7, 0, 0, 0.5]))
    assert overlap(box, other).equal(overlap(other, box))
    # The shape of the picture is squashed with both boxes.
    torch.testing.assert_close(
        overlap(box * torch.tensor([3, 1, 3, 1]), other * torch.tensor([3, 1, 3, 1])), overlap(box, other)
    )


def test_the_right_box_is_found_among_detected_boxes():
    objective = GroundingConfig(reading="full").build(single_model().config, made_tokenizer())
    batch = grounding_batch()
    near, far = batch.target.clone(), batch.target.clone()
    near[:, 2:] += 0.01
    far[1] = torch.tensor([0.9, 0.9, 1.0, 1.0])
    right, known = objective.right(replace(batch, target=near))
    assert right.tolist() == [2, 0, 3] and known.all()
    assert objective.right(replace(batch, target=far))[1].tolist() == [True, False, True]
    rank = GroundingConfig(reading="full", loss="rank").build(single_model().config, made_tokenizer())
    assert rank.right(batch)[1].tolist() == [True, False, True]  # alone, a region cannot be ranked


@pytest.mark.parametrize("made", [single_model, made_model])
@pytest.mark.parametrize("loss", ["ce", "rank"])
@pytest.mark.parametrize("layers", [1, 2])
def test_every_model_learns_and_padding_changes_nothing(made, loss, layers):
    model, batch = made(), grounding_batch()
    config = GroundingConfig(reading="full", loss=loss, layers=layers, margin=2.0)
    module = Pretraining(model, {"task": config.build(model.config, made_tokenizer())})
    objective, losses = module.objectives["task"], module(batch)
    assert losses["task/region"].count == module.counts(batch)["task/region"] == (3 if loss == "ce" else 2)
    combine(losses).backward()
    for name, parameter in objective.named_parameters():
        if not name.endswith("head.bias") and name != "head.3.bias":  # the same for all regions
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    scores = objective.scores(model, module.encode_image(batch), batch)
    assert (scores[~batch.regions.mask] == -1e4).all()
    regions = replace(batch.regions, box=F.pad(batch.regions.box, (0, 0, 0, 2)), classes=None)
    regions = replace(regions, feature=F.pad(batch.regions.feature, (0, 0, 0, 2)))
    wide = replace(batch, ids=F.pad(batch.ids, (0, 3)), regions=regions)
    torch.testing.assert_close(
        objective.scores(model, module.encode_image(wide), wide)[:, :5], scores, atol=1e-5, rtol=1e-5
    )


def test_losses_are_those_of_a_loop():
    model, batch = single_model(), grounding_batch()
    build = lambda **options: GroundingConfig(reading="full", **options).build(model.config, made_tokenizer())  # noqa: E731
    mean, sums, rank = build(), build(reduction="sum"), build(loss="rank", hard=1.0)
    sums.load_state_dict(mean.state_dict())
    rank.load_state_dict(mean.state_dict())
    scores = mean.scores(model, batch.regions.feature, batch).detach().double()
    each = [
        -F.log_softmax(row[:n], -1)[k]
        for row, n, k in zip(scores, batch.regions.count, mean.right(batch)[0], strict=True)
    ]
    loss = mean(model, batch.regions.feature, batch)["region"]
    assert (loss.total / loss.count).item() == pytest.approx(sum(each).item() / 3, rel=1e-5)
    loss = sums(model, batch.regions.feature, batch)["region"]
    assert loss.count == sums.counts(batch)["region"] == 1 and loss.total.item() == pytest.approx(
        sum(each).item(), rel=1e-5
    )
    known = 0.0
    for row, n, k in ((scores[0], 3, 2), (scores[2], 5, 3)):
        best = max(row[j] for j in range(n) if j != k)
        known += max(0.0, 0.2 + best.sigmoid().item() - row[k].sigmoid().item())
    loss = rank(model, batch.regions.feature, batch)["region"]
    assert loss.total.item() == pytest.approx(known, rel=1e-4, abs=1e-6)


def test_the_wrong_region_is_drawn_by_the_seed_from_all_others():
    batch = grounding_batch(chosen=(2, 0, 3))
    objective = GroundingConfig(reading="full", loss="rank", hard=0.0).build(single_model().config, made_tokenizer())
    scores, right = torch.zeros(3, 5), torch.tensor([2, 0, 3])
    seen = set()
    for seed in range(60):
        seeded = replace(batch, seed=torch.tensor([seed, seed, seed]))
        wrong = objective.wrong(scores, right, seeded)
        assert objective.wrong(scores, right, seeded).equal(wrong)
        seen.add(int(wrong[2]))
        assert wrong[0] in (0, 1)
    assert seen == {0, 1, 2, 4}


def test_items_have_the_right_box(world, tokenizer):
    data = GroundingData(train=str(world / "train"), batch_size=4, regions=RegionSource())
    made, shards = data.items("train", tokenizer, SIZE, strict=True), Shards(data.train)
    for _ in range(2):  # decoded, then from the cache
        batch, _ = made([Row(k, k) for k in range(8)])
        for item, box in zip(made.items, batch.target):
            box_in_pixels = shards.info(item.record)["objects"][item.entry["object"]]["box"]
            torch.testing.assert_close(box, torch.tensor(box_in_pixels) / 32)
    objective = GroundingConfig(reading="full").build(single_model().config, made_tokenizer())
    right, known = objective.right(batch)
    assert known.all() and right.tolist() == [item.entry["object"] for item in made.items[:8]]


def test_expressions_without_an_object_in_the_picture_are_named(tmp_path, tokenizer):
    scene = scene_record(WorldConfig(size=32), "train", 0)
    strange = [{"text": "the star", "object": 9}, {"text": "the star", "object": "first"}]
    with ShardWriter(tmp_path / "train") as writer:
        writer.write(scene)
        writer.write(Record(key="strange", images=scene.images, info={**scene.info, "expressions": strange}))
        outside = [{"class": "a", "box": [40, 40, 50, 50]}, {"class": "b", "box": [0, 0, 9, 9]}]
        info = {"objects": outside, "expressions": [{"text": "the star", "object": 0}]}
        writer.write(Record(key="outside", images=scene.images, info=info))
    data = GroundingData(train=str(tmp_path / "train"), batch_size=4, regions=RegionSource())
    made = data.items("train", tokenizer, SIZE, strict=False)
    batch, dropped = made([Row(k, k) for k in range(len(made.items))])
    assert [d.key for d in dropped] == ["strange", "strange", "outside"]
    assert "object 9 of" in dropped[0].reason and "`fit`" in dropped[2].reason
    assert len(batch) == len(scene.info["expressions"])


def test_measures_against_a_loop(world, tokenizer):
    data = GroundingData(train=str(world / "train"), test=str(world / "test"), batch_size=4, regions=RegionSource())
    made = data.evaluation_items("test", tokenizer, SIZE)

    class First(torch.nn.Module):
        def scores(self, model, image_BKD, batch):
            return -torch.arange(batch.regions.box.shape[1]).float().expand(len(batch), -1)

    found = measure(single_model(crop=4), First(), made, 4)
    count = len(made.items)
    first = [item.entry["object"] == 0 for item in made.items]
    things = [len(Shards(data.test).info(item.record)["objects"]) for item in made.items]
    assert found["count"] == count and found["reachable"] == 1
    # Two things hardly ever overlap by half.
    assert found["accuracy"] == pytest.approx(sum(first) / count, abs=0.02)
    assert found["chance"] == pytest.approx(sum(1 / n for n in things) / count, abs=0.02)


def test_the_released_head_gives_the_released_loss():
    from tests.parity.test_uniter_parity import build, regions_of

    c, tol, weights, known = load("uniter_re")
    model = build("uniter_re", "re_output.")
    objective = GroundingConfig(reading="full", reduction="sum", layers=c["re_mlp"]).build(
        model.config, made_tokenizer()
    )
    objective.head.load_state_dict({k: weights[f"re_output.{k}"] for k in objective.head.state_dict()})
    regions, right = regions_of(known), known["in.targets"][:, 0]
    batch = replace(
        region_batch(lengths=tuple(known["in.txt_lens"].tolist()), counts=tuple(known["in.num_bbs"].tolist())),
        ids=known["in.input_ids"],
        regions=regions,
        target=regions.box[torch.arange(len(right)), right],
    )
    assert objective.right(batch)[0].equal(right)
    assert_close(combine(objective(model, known["in.img_feat"], batch)), known["out.loss"], tol["out.loss"], "loss")
