"""Objectives on a single stream: masked regions, masked words beside them, matching with alignment."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from fastvlp.batch import Batch, Regions
from fastvlp.data.batching import budget_sizes
from fastvlp.data.records.detections import pack, unpack
from fastvlp.data.records.shards import ShardWriter
from fastvlp.data.world.corpus import WorldConfig, scene_record
from fastvlp.errors import UserError
from fastvlp.model.model import VLModel
from fastvlp.objectives.mlm import MLMConfig
from fastvlp.objectives.objective import Objective, ObjectiveConfig, combine
from fastvlp.objectives.region import MRCConfig, MRFRConfig, class_divergence, class_nll, feature_error
from fastvlp.objectives.transport import transport_distance
from fastvlp.objectives.wra import WRAConfig, match_loss
from fastvlp.random import mix64
from fastvlp.recipes.uniter_demo import uniter_demo
from fastvlp.training.loop import start, steps
from tests.made import SPECIALS, made_config, made_tokenizer
from tests.made_single import CLASSES, FEATURE, region_batch, row_of, single_config, single_model

BATCH = region_batch(lengths=(9, 4, 7, 6), counts=(5, 3, 6, 2), seed=6)
CLASSES_TOLD = {"classes": CLASSES}


def build(config: ObjectiveConfig) -> Objective:
    torch.manual_seed(3)
    objective = config.build(single_config(), made_tokenizer())
    for parameter in objective.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return objective


def run(config: ObjectiveConfig, model: VLModel, batch: Batch):
    return build(config).double()(model, model.encode_image(batch.image, regions=batch.regions), batch)


ROWWISE = [
    MRFRConfig(rate=0.4),
    MRFRConfig(rate=0.4, reduction="sum", word_rate=0.3),
    MRCConfig(rate=0.4, **CLASSES_TOLD),
    MRCConfig(rate=0.4, target="hard", **CLASSES_TOLD),
    MLMConfig(mask_rate=0.3),
    MLMConfig(mask_rate=0.3, region_rate=0.4),
]


@pytest.mark.parametrize("config", ROWWISE, ids=str)
def test_a_row_is_the_same_in_any_batch(config: ObjectiveConfig):
    """Losses of a batch are the sums of its rows alone, and their counts are known before the pass."""
    model = single_model().double()
    (together,) = run(config, model, BATCH).values()
    assert together.count == build(config).counts(BATCH)["masked"] > 0
    alone = [run(config, model, row_of(BATCH, b))["masked"] for b in range(4)]
    torch.testing.assert_close(torch.stack([loss.total for loss in alone]).sum(), together.total)
    assert sum(int(loss.count) for loss in alone) == together.count


def test_the_divergences_mean_is_so_many_times_smaller():
    """1601 with the detector's classes: what the released code's reduction amounts to (spec A2.5)."""
    generator = torch.Generator().manual_seed(0)
    logits, share = torch.randn(2, 7, 1601, generator=generator)
    share = share.softmax(1)
    ratio = class_divergence(logits, share, "batchmean") / class_divergence(logits, share, "mean")
    torch.testing.assert_close(ratio, torch.full_like(ratio, 1601))
    expected = (share * (share.log() - logits.log_softmax(1))).sum(1)
    torch.testing.assert_close(class_divergence(logits, share, "batchmean"), expected)


def test_feature_error_by_code_and_by_paper():
    predicted, target = torch.randn(2, 5, 2048, generator=torch.Generator().manual_seed(0))
    code, paper = (feature_error(predicted, target, how) for how in ("mean", "sum"))
    torch.testing.assert_close(paper, 2048 * code)
    torch.testing.assert_close(paper, (predicted - target).norm(dim=1) ** 2)


def test_the_background_is_never_a_target():
    share = torch.tensor([[0.9, 0.02, 0.08], [0.1, 0.5, 0.4]])
    logits = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(class_nll(logits, share), -logits.log_softmax(1)[[0, 1], [2, 1]])
    torch.testing.assert_close(class_nll(logits, share, background=False), -logits.log_softmax(1)[[0, 1], [0, 1]])


def seen(config: ObjectiveConfig) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The inputs that an objective gives to the model: ids, and the regions that are masked."""
    model, read = single_model().double(), {}
    inner = model.read_regions

    def spy(feature, regions, ids, length, hidden_BR=None):
        read.update(ids=ids, hidden=hidden_BR)
        return inner(feature, regions, ids, length, hidden_BR=hidden_BR)

    model.read_regions = spy  # type: ignore[method-assign]
    run(config, model, BATCH)
    return read["ids"], read["hidden"]


def test_conditional_masking():
    """No word is hidden while regions are, and the other way round, unless the joint rates say so."""
    ids, hidden = seen(MRFRConfig(rate=0.4))
    assert torch.equal(ids, BATCH.ids) and hidden.any()
    ids, hidden = seen(MLMConfig(mask_rate=0.5))
    assert (ids == SPECIALS["mask"]).any() and hidden is None
    for config in (MRFRConfig(rate=0.4, word_rate=0.5), MLMConfig(mask_rate=0.5, region_rate=0.4)):
        ids, hidden = seen(config)
        assert (ids == SPECIALS["mask"]).any() and hidden.any()


def test_regions_of_no_known_class_are_not_asked_for():
    share = BATCH.regions.classes.clone()
    share[:, 0] = 0
    objective = build(MRCConfig(rate=1.0, **CLASSES_TOLD))
    hidden = objective.hidden(replace(BATCH, regions=replace(BATCH.regions, classes=share)))
    assert hidden.sum(1).tolist() == [4, 2, 5, 1] and not hidden[:, 0].any()


def test_a_batch_that_tells_no_classes_has_no_target():
    """Such as come by chance where few records have `soft_labels`; data of which no record has any is a mistake."""
    unclassified = replace(BATCH, regions=replace(BATCH.regions, classes=None))
    for target in ("soft", "hard"):
        objective = build(MRCConfig(target=target, **CLASSES_TOLD)).double()
        assert objective.counts(unclassified)["masked"] == 0
        loss = objective(single_model().double(), BATCH.regions.feature.double(), unclassified)["masked"]
        combine({"masked": loss}).backward()
        assert loss.total == loss.count == 0 and not objective.classify.weight.grad.any()
    objective.check(iter([unclassified, unclassified, BATCH]))
    objective.check(iter([]))  # the first batch says what cannot be read
    with pytest.raises(UserError, match=r"5 classes of regions.* none: `data\.regions\.classes`"):
        objective.check(iter([unclassified, unclassified]))


def test_a_run_begins_if_any_record_tells_classes(tmp_path):
    for name, classified in (("few", 3), ("none", 0)):
        with ShardWriter(tmp_path / name) as writer:
            for i in range(8):
                record = scene_record(WorldConfig(size=16), "train", i)
                found = [
                    unpack(part) if i == classified else unpack(part)._replace(classes_RC=None)
                    for part in record.detected
                ]
                kept = () if name == "none" and i == 0 else tuple(map(pack, found))
                writer.write(replace(record, detected=kept))
    run = replace(uniter_demo(), budget_s=None, steps=8, seed=1, out=str(tmp_path / "run"), device="cpu", vocab=60)
    mrc, data = run.objectives["mrc_kl"], replace(run.data, val=None, batch_size=2)
    run = replace(run, objectives={"mrc": mrc}, mix=None, precision="fp32")
    state = start(replace(run, data=replace(data, train=str(tmp_path / "few"))))
    assert 0 < sum(report.tokens == 0 for report in steps(state)) < 8
    with pytest.raises(UserError, match=r"classes of regions.* none: `data\.regions\.classes`"):
        start(replace(run, data=replace(data, train=str(tmp_path / "none"))))


def test_feature_regression_is_tied_to_the_projection_that_reads_features():
    model, objective = single_model().double(), build(MRFRConfig()).double()
    state = torch.randn(3, 32).double()
    weight = model.single.regions.feature.weight
    error = objective.error(model, state, torch.zeros(3, FEATURE).double(), BATCH, BATCH.regions.mask)
    torch.testing.assert_close(error, (state @ weight + objective.bias).square().mean(1))


def test_what_is_lacking_is_said():
    model, bare = single_model(), replace(BATCH, regions=None)
    with pytest.raises(UserError, match=r"data\.regions"):
        build(MRFRConfig()).counts(bare)
    with pytest.raises(UserError, match="1601"):
        build(MRCConfig()).counts(BATCH)
    with pytest.raises(UserError, match=r"model\.single"):
        MRFRConfig().build(made_config(), made_tokenizer())
    with pytest.raises(UserError, match=r"`data\.batch_size`; if `data\.max_tokens`"):
        build(WRAConfig())(model, BATCH.regions.feature[:1], row_of(BATCH, 0))
    for wrong in ({"rate": 0.0}, {"rate": 1.5}, {"word_rate": -0.1}):
        with pytest.raises(ValueError, match="share"):
            MRFRConfig(**wrong)
    with pytest.raises(ValueError, match="region_rate"):
        MLMConfig(region_rate=2.0)
    with pytest.raises(UserError, match=r"`region_rate`.*`model\.single`"):
        MLMConfig(region_rate=0.1).build(made_config(), made_tokenizer())
    with pytest.raises(ValueError, match="wrong pairs"):
        WRAConfig(rate=1.0)


@pytest.mark.parametrize("negative", ["image", "text", "both"])
def test_wrong_pairs(negative):
    batch = region_batch(lengths=(5,) * 400, counts=(1,) * 400)
    batch = replace(batch, ids=batch.ids % 8 // 7 + 5)  # many texts are the same
    text, image, right = build(WRAConfig(rate=0.3, negative=negative)).pairs(batch)
    own = torch.arange(400)
    assert torch.equal(right, (text == own) & (image == own))
    same = (batch.ids[text] == batch.ids[image]).all(1)
    assert torch.equal(same, right), "a pair with the very same text is not wrong"
    assert (~right).float().mean().item() == pytest.approx(0.3, abs=0.05)
    others = (text != own).float().mean() / (~right).float().mean()
    assert others.item() == pytest.approx({"image": 0.0, "text": 1.0, "both": 0.5}[negative], abs=0.1)


@pytest.mark.parametrize("negative", ["image", "text", "both"])
def test_wrong_pairs_stay_within_the_budget_and_cannot_be_told_by_their_number_of_regions(negative):
    """Text and regions as UNITER's data has them, cut into batches of 10,240 tokens; of another pair a row would be up to
    1.4 times that long (bug U-7). Were only shorter ones drawn, a right pair would have more regions with a chance of 0.55."""
    generator = torch.Generator().manual_seed(0)
    text, count = (
        (mean + std * torch.randn(6000, generator=generator)).round().clamp(*limits).long()
        for mean, std, limits in ((13.5, 3.5, (3, 62)), (36, 16, (10, 100)))
    )
    order = (text + count).argsort(descending=True)
    objective, rights, counts = build(WRAConfig(negative=negative)), [], []
    for row in order.split(budget_sizes((text + count)[order], 10240)):
        batch = Batch(
            image=row[:, None],
            ids=row[:, None],
            length=text[row],
            seed=mix64(row),
            regions=Regions(box=torch.zeros(len(row), 100, 4), count=count[row]),
        )
        words, image, right = objective.pairs(batch)
        counts.append(objective.regions(batch, words, image).count)
        assert len(row) * (batch.length[words] + counts[-1]).max() <= 10240
        rights.append(right)
    right, found = torch.cat(rights), torch.cat(counts)
    assert right.float().mean().item() == pytest.approx(0.5, abs=0.03)
    more = (found[right, None] > found[~right]).double().mean() + (
        found[right, None] == found[~right]
    ).double().mean() / 2
    assert more.item() == pytest.approx(0.5, abs=0.025)
    assert found[right].double().mean().item() == pytest.approx(found[~right].double().mean().item(), abs=0.8)


def test_wrong_pairs_exchange_their_images():
    """Wrong rows come in twos, so that they have the same images, and numbers of regions, as before; of a row that would be too
    long the last regions are left out."""
    batch = region_batch(lengths=(9, 4), counts=(3, 8))
    seeds, kinds = mix64(torch.arange(40)).view(20, 2), set()
    for seed in seeds:
        for negative in ("image", "text"):
            objective = build(WRAConfig(negative=negative))
            moved = replace(batch, seed=seed)
            text, image, right = objective.pairs(moved)
            kinds.add((negative, tuple(right.tolist())))
            assert (text if negative == "text" else image).tolist() == ([0, 1] if right.all() else [1, 0])
            regions = objective.regions(moved, text, image)
            # The longest row has 12 tokens.
            wrong = [3, 3]
            assert regions.count.tolist() == ([3, 8] if right.all() else wrong)
            assert torch.equal(regions.box, batch.regions.box[image]) and regions.mask.sum(1).equal(regions.count)
    assert kinds == {(n, both) for n in ("image", "text") for both in ((True, True), (False, False))}
    many = region_batch(lengths=(5,) * 100, counts=tuple(1 + i % 7 for i in range(100)))
    _, image, right = build(WRAConfig(rate=0.99)).pairs(many)
    own = torch.arange(100)
    assert torch.equal(image[image], own) and torch.equal(image == own, right) and (~right).sum() > 90
    count = many.regions.count
    assert (count[image] - count).abs().max() <= 1, "the other has nearly as many regions"


def test_a_pair_with_nothing_but_copies_stays_right():
    batch = region_batch(lengths=(5, 5, 5), counts=(2, 2, 2))
    copies = replace(batch, ids=batch.ids[:1].expand(3, -1))
    assert build(WRAConfig(rate=0.99)).pairs(copies)[2].all()
    objective = build(WRAConfig(rate=0.99, equal_pairs="negatives"))
    assert not all(objective.pairs(replace(copies, seed=mix64(copies.seed + k)))[2].all() for k in range(3))


@pytest.mark.parametrize("sign", ["code", "paper"])
@pytest.mark.parametrize("special", [True, False])
def test_matching_and_alignment_equal_a_loop(sign, special):
    model = single_model().double()
    config = WRAConfig(negative="both", sign=sign, special=special)
    objective, match, align, aligned = build(config), 0.0, 0.0, 0
    losses = run(config, model, BATCH)
    for t, i, right in zip(*objective.pairs(BATCH)):
        ids, length = row_of(BATCH, int(t)).ids, BATCH.length[t : t + 1]
        other = row_of(BATCH, int(i))
        joint = model.read_regions(other.regions.feature, other.regions, ids, length)
        match += F.cross_entropy(model.single.match(joint.pooled)[0], right.long())
        words = joint.text[0] if special else joint.text[0, 1:-1]
        everyone = torch.ones(1, max(len(words), joint.region.shape[1])).bool()
        distance = transport_distance(
            words[None], joint.region, everyone[:, : len(words)], everyone[:, : joint.region.shape[1]]
        )
        if right or sign == "code":
            align, aligned = align + (distance[0] if right else -distance[0]), aligned + 1
    torch.testing.assert_close(losses["match"].total, match)
    torch.testing.assert_close(losses["align"].total, align)
    assert losses["align"].weight == 0.1
    assert {name: int(loss.count) for name, loss in losses.items()} == {"match": 4, "align": aligned}
    assert {name: int(count) for name, count in objective.counts(BATCH).items()} == {"match": 4, "align": aligned}


def test_matching_alone():
    losses = run(WRAConfig(align=0.0), single_model().double(), BATCH)
    assert losses.keys() == {"match"} == build(WRAConfig(align=0.0)).counts(BATCH).keys()


def test_binary_matching_reads_the_score_of_retrieval_alone():
    logits, right = torch.randn(5, 2, generator=torch.Generator().manual_seed(0)), torch.arange(5) < 2
    score = torch.sigmoid(logits[:, 1])
    torch.testing.assert_close(match_loss(logits, right, "bce"), -torch.where(right, score, 1 - score).log())
