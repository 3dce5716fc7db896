import pytest
import torch
import torch.nn.functional as F

from fastvlp.batch import Batch
from fastvlp.errors import UserError
from fastvlp.objectives.objective import combine
from fastvlp.tasks.nlvr import NLVRConfig
from fastvlp.tasks.nlvr2 import NLVR2Config
from fastvlp.tasks.vqa import VQAConfig
from fastvlp.training.pretraining import Pretraining
from tests.made import made_batch, made_config, made_model, made_tokenizer

READINGS = ("full", "causal", "flm")


def with_target(batch, target, slot=None):
    return Batch(image=batch.image, ids=batch.ids, length=batch.length, seed=batch.seed, slot=slot, target=target)


def vqa_batch():
    target = torch.tensor([[1.0, 0, 0.3], [0, 0, 1], [0.6, 0.9, 0], [0, 0, 0]])
    return with_target(made_batch(lengths=(7, 4, 9, 5)), target)


def pair_batch():
    one = made_batch(lengths=(7, 7, 5, 5))
    ids = one.ids.clone()
    ids[1::2] = ids[0::2]
    batch = Batch(image=one.image, ids=ids, length=one.length, seed=one.seed)
    return with_target(batch, torch.tensor([1, 0]), slot=torch.tensor([0, 1, 0, 1]))


@pytest.mark.parametrize("reading", READINGS)
def test_every_head_takes_every_reading(reading):
    """A model with one stream over the text has two of them, full and causal."""
    model = made_model(reconstructor=reading == "flm")
    options = {"reading": reading}
    truth = with_target(made_batch(lengths=(7, 4, 9)), torch.tensor([1, 0, 1]))
    for config, batch in (
        (VQAConfig(**options, answers=3), vqa_batch()),
        (NLVRConfig(**options), truth),
        (NLVR2Config(**options), pair_batch()),
    ):
        module = Pretraining(model, {"task": config.build(model.config, made_tokenizer())})
        losses = module(batch)
        assert {name: loss.count.item() for name, loss in losses.items()} == {
            name: count.item() for name, count in module.counts(batch).items()
        }
        combine(losses).backward()
        for name, parameter in module.objectives.named_parameters():
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_vqa_loss_is_that_of_a_plain_loop():
    model, batch = made_model(), vqa_batch()
    objective = VQAConfig(reading="flm", answers=3).build(model.config, made_tokenizer())
    image_BKD = model.encode_image(batch.image)
    loss = objective(model, image_BKD, batch)["answer"]
    logits = objective.logits(model, image_BKD, batch).detach()
    means = []
    for row, target in zip(logits.double(), batch.target.double()):
        bce = [-(t * x.sigmoid().log() + (1 - t) * (1 - x.sigmoid()).log()) for x, t in zip(row, target)]
        means.append(sum(bce) / len(bce))
    mean = sum(means) / len(means)
    assert (loss.total / loss.count).item() == pytest.approx((mean * logits.shape[1]).item(), rel=1e-5)


def test_head_is_pooler_and_two_layers():
    model, batch = made_model(), vqa_batch()
    objective = VQAConfig(reading="full", answers=3).build(model.config, made_tokenizer())
    image_BKD = model.encode_image(batch.image)
    summary = model.summarise(image_BKD, batch.ids, batch.length, reading="full")
    pooled = torch.tanh(F.linear(summary, objective.pool.weight, objective.pool.bias))
    first, norm, _, last = objective.head
    assert first.weight.shape == (64, 32) and last.weight.shape == (3, 64)
    known = last(F.gelu(norm(first(pooled))))
    torch.testing.assert_close(objective.logits(model, image_BKD, batch), known)


def test_answers_start_at_equal_chance():
    objective = VQAConfig(reading="full", answers=50).build(made_config(), made_tokenizer())
    torch.testing.assert_close(objective.head[-1].bias.sigmoid(), torch.full((50,), 1 / 50))


def test_nlvr2_concatenates_the_summaries_beside_both_images():
    model, batch = made_model(), pair_batch()
    objective = NLVR2Config(reading="causal").build(model.config, made_tokenizer())
    image_BKD = model.encode_image(batch.image)
    halves = []
    for k in (0, 1):
        slot = torch.full((2,), k)
        summary = model.summarise(image_BKD[k::2], batch.ids[k::2], batch.length[k::2], reading="causal", slot_B=slot)
        halves.append(torch.tanh(objective.pool(summary)))
    known = objective.head(torch.cat(halves, 1))
    torch.testing.assert_close(objective.logits(model, image_BKD, batch), known)
    swapped = Batch(
        image=batch.image.view(2, 2, 3, 16, 16).flip(1).flatten(0, 1),
        ids=batch.ids,
        length=batch.length,
        seed=batch.seed,
        slot=batch.slot,
    )
    other = objective.logits(model, model.encode_image(swapped.image), swapped)
    assert not torch.allclose(other, known, atol=1e-4)


def test_padding_changes_nothing():
    model, batch = made_model(), vqa_batch()
    for reading in READINGS:
        objective = VQAConfig(reading=reading, answers=3).build(model.config, made_tokenizer())
        wide = Batch(
            image=batch.image,
            ids=F.pad(batch.ids, (0, 5)),
            length=batch.length,
            seed=batch.seed,
        )
        image_BKD = model.encode_image(batch.image)
        torch.testing.assert_close(
            objective.logits(model, image_BKD, wide), objective.logits(model, image_BKD, batch), atol=1e-5, rtol=1e-5
        )


def test_a_reading_that_the_model_lacks_is_refused():
    config = made_config(reconstructor=False)
    with pytest.raises(UserError, match="reconstructor"):
        VQAConfig(reading="flm", answers=3).build(config, made_tokenizer())
