"""Equal captions and equal pictures are no negatives of each other: what is equal, each loss against a loop in float64, and
that nothing changes where nothing is equal."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastvlp.batch import Batch
from fastvlp.data.contents import hash_rows
from fastvlp.model.model import VLModel
from fastvlp.model.sizes import two_towers
from fastvlp.objectives.clip import CLIPConfig
from fastvlp.objectives.contrastive import info_nce, queue_nce, sigmoid_loss
from fastvlp.objectives.equal_pairs import are_equal, contents, has_equal
from fastvlp.objectives.itm import ITMConfig
from fastvlp.objectives.moco import MoCoConfig, albef
from fastvlp.objectives.objective import combine
from fastvlp.objectives.siglip import SigLIPConfig
from fastvlp.objectives.wra import WRAConfig
from fastvlp.random import mix64
from fastvlp.tasks.retrieval import RetrievalConfig
from tests.made import made_batch, made_config, made_model, made_tokenizer
from tests.made_single import region_batch, row_of, single_model
from tests.objectives.test_contrastive import TARGET, WHOLE, B, E, K, M, assert_same, number, unit


def with_copies(batch: Batch, texts: dict[int, int], images: dict[int, int]) -> Batch:
    """Row b gets the text, or the image and its regions, of another row."""
    text, image = torch.arange(len(batch)), torch.arange(len(batch))
    for row, source in texts.items():
        text[row] = source
    for row, source in images.items():
        image[row] = source
    regions = batch.regions
    if regions is not None:
        parts = {name: getattr(regions, name)[image] for name in ("box", "count", "feature", "classes")}
        regions = replace(regions, **parts)
    return replace(
        batch, ids=batch.ids[text], length=batch.length[text], image=batch.image[image], regions=regions, content=None
    )


# Rows 0 and 3 have one text, 1 and 4 one image, 2 and 5 both.
COPIES = ({3: 0, 5: 2}, {4: 1, 5: 2})
EQUAL = {(0, 3), (1, 4), (2, 5)}


def equal(i: int, j: int) -> bool:
    return (i, j) in EQUAL or (j, i) in EQUAL


def made_pairs(seed: int = 0) -> Batch:
    return with_copies(made_batch(lengths=(6, 5, 9, 4, 7, 8), seed=seed), *COPIES)


def test_what_is_equal():
    found = are_equal(contents(made_pairs()), contents(made_pairs()))
    for i in range(6):
        for j in range(6):
            assert bool(found[i, j]) == (i == j or equal(i, j))
    assert has_equal(contents(made_pairs())).all()
    assert not has_equal(contents(made_batch(lengths=(5, 5, 5)))).any()
    three = with_copies(made_batch(lengths=(5,) * 5), {1: 0, 4: 0}, {})
    assert has_equal(contents(three)).tolist() == [True, True, False, False, True]


def test_padding_and_augmentation_change_nothing_and_each_word_and_pixel_counts():
    batch = made_batch(lengths=(6, 6))
    known = contents(batch)
    wider = replace(batch, ids=F.pad(batch.ids, (0, 3), value=7))
    assert torch.equal(contents(wider), known)
    assert torch.equal(contents(replace(batch, image=batch.image.flip(3), plain=batch.image)), known)
    for b in range(2):
        ids, image = batch.ids.clone(), batch.image.clone()
        ids[b, 2] += 1
        image[b, 2, 15, 15] ^= 128
        changed = contents(replace(batch, ids=ids, image=image)) != known
        assert changed.tolist() == [[row == b] * 2 for row in range(2)]
    shorter = contents(replace(batch, length=torch.tensor([5, 6])))
    assert shorter[0, 0] != known[0, 0] and shorter[1, 0] == known[1, 0]


def test_a_detectors_features_tell_blank_images_apart():
    batch = region_batch(lengths=(5, 5, 5), counts=(2, 3, 2))
    batch = with_copies(replace(batch, image=torch.zeros_like(batch.image)), {}, {2: 0})
    image_B = contents(batch)[:, 1]
    assert image_B[0] == image_B[2] != image_B[1]
    assert contents(row_of(batch, 0))[0, 1] == image_B[0], "regions of padding change nothing"


def test_few_hashes_are_alike():
    """All pairs of pixels that differ in their top bits alone, where sums of products cancel most easily."""
    rows = torch.zeros(64 * 63 // 2, 64, dtype=torch.uint8)
    first, second = torch.triu_indices(64, 64, 1)
    rows[torch.arange(len(rows)), first] = 128
    rows[torch.arange(len(rows)), second] = 128
    assert len(hash_rows(rows).unique()) == len(rows)
    for kind in (torch.float16, torch.float32, torch.uint8):
        assert len(hash_rows(torch.arange(200).to(kind)[:, None, None]).unique()) == 200


# Text and image of the five rows and of the eleven columns; TARGET is each row's own column.
COLUMNS = torch.tensor([[i, i + 20] for i in range(M)])
COLUMNS[1, 0], COLUMNS[9, 0], COLUMNS[2, 1], COLUMNS[4, 1], COLUMNS[5] = 3, 3, 30, 27, COLUMNS[3]
CONTENT = COLUMNS[TARGET], COLUMNS
QUEUED = torch.tensor([[3, 50], [60, 30], [-1, -1], [3, 23], [61, 51], [-1, -1], [10, 52]])
IS_EQUAL, IN_QUEUE = are_equal(*CONTENT), are_equal(CONTENT[0], QUEUED)


def test_the_made_columns_have_equal_ones_of_every_kind():
    extra = IS_EQUAL.sum(1) - 1
    assert extra.tolist() == [3, 1, 0, 3, 1] and IN_QUEUE.sum(1).tolist() == [2, 2, 0, 2, 0]


def own_first(logits: Tensor, others: Tensor, b: int) -> Tensor:
    """The cross-entropy of a row whose own logit is `logits`, beside those that are negatives."""
    return torch.cat([logits[None], others]).logsumexp(0) - logits


@WHOLE
def test_info_nce_leaves_out_equal_columns(whole_logits):
    query, key, scale = unit(B, E), unit(M, E, seed=1), number(3.0)
    logits = scale * query @ key.T
    known = torch.stack([own_first(logits[b, TARGET[b]], logits[b, ~IS_EQUAL[b]], b) for b in range(B)])
    mine = info_nce(query, key, TARGET, scale, content=CONTENT, whole_logits=whole_logits)
    assert_same(mine, known, (query, key, scale))


@WHOLE
def test_sigmoid_loss_leaves_out_equal_columns(whole_logits):
    image, text, scale, bias = unit(B, E), unit(M, E, seed=1), number(3.0), number(-2.0)
    logits = scale * image @ text.T + bias
    known = torch.stack(
        [F.softplus(-logits[b, TARGET[b]]) + F.softplus(logits[b, ~IS_EQUAL[b]]).sum() for b in range(B)]
    )
    mine = sigmoid_loss(image, text, TARGET, scale, bias, content=CONTENT, whole_logits=whole_logits)
    assert_same(mine, known, (image, text, scale, bias))


@WHOLE
@pytest.mark.parametrize("alpha", [None, 0.4])
@pytest.mark.parametrize("mode", ["pos+queue", "batch+queue"])
def test_queue_nce_leaves_out_equal_keys_of_the_step_and_of_earlier_ones(mode, alpha, whole_logits):
    query, key, queue, scale = unit(B, E), unit(M, E, seed=1), unit(K, E, seed=2), number(3.0)
    if alpha is not None and mode == "pos+queue":
        return
    momentum, known = unit(B, E, seed=3).detach(), []
    for b in range(B):
        others = key[~IS_EQUAL[b]] if mode == "batch+queue" else key[:0]
        candidates = torch.cat([key[TARGET[b], None], others, queue[~IN_QUEUE[b]]]).detach()
        target = F.one_hot(torch.tensor(0), len(candidates)).double()
        if alpha is not None:
            target = (1 - alpha) * target + alpha * (scale.detach() * candidates @ momentum[b]).softmax(0)
        known.append(-(target * (scale * candidates @ query[b]).log_softmax(0)).sum())
    options = {} if alpha is None else {"momentum_BE": momentum, "alpha": alpha}
    mine = queue_nce(
        query,
        key,
        queue,
        TARGET,
        scale,
        mode,
        content=CONTENT,
        queue_content_K2=QUEUED,
        whole_logits=whole_logits,
        **options,
    )
    assert_same(mine, torch.stack(known), (query, scale))


@WHOLE
def test_a_row_without_any_negative_has_no_loss(whole_logits):
    query, key, scale = unit(B, E), unit(M, E, seed=1), number(3.0)
    same = torch.zeros(B, 2, dtype=torch.int64), torch.zeros(M, 2, dtype=torch.int64)
    loss = info_nce(query, key, TARGET, scale, content=same, whole_logits=whole_logits)
    assert not loss.any()
    for gradient in torch.autograd.grad(loss.sum(), (query, key, scale)):
        assert not gradient.any()


def towers(seed: int = 0) -> VLModel:
    torch.manual_seed(seed)
    return VLModel(two_towers(made_config(depth=1), width=8)).double()


@pytest.mark.parametrize("config", [CLIPConfig(), SigLIPConfig(), MoCoConfig(mode="batch+queue", queue=4, warm=True)])
def test_the_objectives_leave_out_equal_pairs(config):
    model, batch = towers(), made_pairs()
    objective = config.build(model.config, made_tokenizer()).double()
    objective.begin(model)
    states = model.encode_image(batch.image)
    image, text = model.embed_image(states), model.embed_text(batch.ids, batch.length)
    losses = objective(model, states, batch)
    if isinstance(config, SigLIPConfig):
        logits, total = 10 * image @ text.T - 10, 0.0
        for i in range(6):
            total += F.softplus(-logits[i, i])
            total += sum(F.softplus(logits[i, j]) for j in range(6) if j != i and not equal(i, j))
        torch.testing.assert_close(losses["pairs"].total, total)
        return
    for name, logits in (("image", image @ text.T / 0.07), ("text", text @ image.T / 0.07)):
        total = 0.0
        for i in range(6):
            others = [j for j in range(6) if j == i or not equal(i, j)]
            total += logits[i, others].logsumexp(0) - logits[i, i]
        torch.testing.assert_close(losses[name].total, total, rtol=1e-6, atol=1e-9)


def test_a_key_that_an_equal_pair_wrote_is_no_negative():
    model, batch = towers(), made_batch(lengths=(6, 5, 9))
    objective = MoCoConfig(queue=5, warm=True).build(model.config, made_tokenizer()).double()
    objective.begin(model)
    states = model.encode_image(batch.image)
    objective(model, states, batch)
    objective.after_step(model)
    assert torch.equal(objective.queue_content[:3], contents(batch)) and (objective.queue_content[3:] == -1).all()
    losses = objective(model, states, batch)
    image, keys = model.embed_image(states), objective.text_queue[:3]
    total = 0.0
    for i in range(3):
        logits = image[i] @ keys.T / 0.07
        own = image[i] @ objective.slow.embed_text(batch.ids, batch.length)[i] / 0.07
        total += own_first(own, logits[[j for j in range(3) if j != i]], i)
    torch.testing.assert_close(losses["image"].total, total, rtol=1e-6, atol=1e-9)
    published = replace(objective.config, equal_pairs="negatives").build(model.config, made_tokenizer()).double()
    published.begin(model)
    for _ in range(2):
        again = published(model, states, batch)
        published.after_step(model)
    assert again["image"].total > losses["image"].total


CONTRASTS = {
    "clip": CLIPConfig(),
    "siglip": SigLIPConfig(),
    "moco": MoCoConfig(queue=7),
    "albef": albef(queue=7),
    "itm": ITMConfig(candidates=3),
    "itm of one": ITMConfig(candidates=1),
    "wra": WRAConfig(),
    "retrieval": RetrievalConfig(reading="full"),
    "retrieval by choice": RetrievalConfig(reading="full", loss="cross-entropy", candidates=3),
    "hard retrieval": RetrievalConfig(reading="full", negatives="hard", keep=3),
}


def losses_and_gradients(config, model: VLModel, batch: Batch) -> list[Tensor]:
    torch.manual_seed(0)
    objective = config.build(model.config, made_tokenizer())
    objective.begin(model)
    model.zero_grad()
    losses = objective(model, model.encode_image(batch.image, regions=batch.regions), batch)
    combine(losses).backward()
    gradients = [p.grad for p in (*model.parameters(), *objective.parameters()) if p.grad is not None]
    return [*(loss.total for loss in losses.values()), *(loss.count for loss in losses.values()), *gradients]


@pytest.mark.parametrize("name", CONTRASTS)
def test_where_nothing_is_equal_all_is_as_before_bit_for_bit(name):
    config, lengths = CONTRASTS[name], (6, 5, 9, 4, 7, 8)
    assert config.equal_pairs == "ignored"
    if name == "wra" or "retrieval" in name:
        model, batch = single_model(), region_batch(lengths=lengths, counts=(2, 3, 1, 4, 2, 3))
    elif "itm" in name:
        model, batch = made_model(), made_batch(lengths=lengths)
    else:
        model, batch = towers().float(), made_batch(lengths=lengths)
    ours = losses_and_gradients(config, model, batch)
    published = losses_and_gradients(replace(config, equal_pairs="negatives"), model, batch)
    assert len(ours) == len(published) and all(map(torch.equal, ours, published))


@pytest.mark.parametrize("candidates", [1, 4, 5])
def test_matching_never_calls_an_equal_pair_wrong(candidates):
    model, batch = made_model(), made_pairs()
    for seed in range(8):
        moved = replace(batch, seed=mix64(batch.seed + seed))
        objective = ITMConfig(candidates=candidates).build(made_config(), made_tokenizer())
        image_BKD = model.encode_image(moved.image)
        wanted, count = 0.0, 0
        other, has = objective.negatives(model, image_BKD, moved), objective.has_negative(moved)
        logits = [
            objective.scores(model, image_BKD, moved.ids[rows], moved.length[rows]) for rows in (torch.arange(6), other)
        ]
        for b in range(6):
            assert not (has[b] and equal(b, int(other[b]))) and (has[b] or equal(b, int(other[b])))
            wanted += F.cross_entropy(logits[0][b], torch.tensor(1))
            wanted += F.cross_entropy(logits[1][b], torch.tensor(0)) if has[b] else 0.0
            count += 1 + int(has[b])
        loss = objective(model, image_BKD, moved)["match"]
        torch.testing.assert_close(loss.total, wanted)
        assert loss.count == objective.counts(moved)["match"] == count
    twins = with_copies(made_batch(lengths=(5, 5)), {1: 0}, {})
    objective = ITMConfig().build(made_config(), made_tokenizer())
    assert objective(model, model.encode_image(twins.image), twins)["match"].count == 2


def made_regions() -> Batch:
    return with_copies(region_batch(lengths=(6, 5, 9, 4, 7, 8), counts=(3,) * 6), *COPIES)


def test_alignment_never_calls_an_equal_pair_wrong():
    batch, kinds = made_regions(), set()
    for seed in range(20):
        moved = replace(batch, seed=mix64(batch.seed + seed))
        for option in ("ignored", "negatives"):
            objective = WRAConfig(rate=0.9, equal_pairs=option).build(made_config(), made_tokenizer())
            for b, (text, image, right) in enumerate(zip(*(x.tolist() for x in objective.pairs(moved)))):
                assert right == (text == image == b)
                kinds.add((option, equal(text, image)) if not right else None)
    assert {("ignored", False), ("negatives", False), ("negatives", True)} <= kinds
    assert ("ignored", True) not in kinds


def test_retrieval_never_calls_an_equal_pair_wrong():
    batch = made_regions()
    wrong = RetrievalConfig(reading="full").build(single_model().config, made_tokenizer()).wrong(batch)
    for i in range(6):
        for j in range(6):
            assert bool(wrong[i, j]) == (i != j and not equal(i, j))
    published = RetrievalConfig(reading="full", equal_pairs="negatives").build(single_model().config, made_tokenizer())
    assert torch.equal(published.wrong(batch), ~torch.eye(6, dtype=torch.bool))
