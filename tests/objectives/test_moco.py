"""Momentum keys and queues: what is written where, what follows what, and what the loss is made of."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastvlp.errors import UserError
from fastvlp.model.keep import random_keep
from fastvlp.model.model import VLModel
from fastvlp.model.sizes import two_towers
from fastvlp.objectives.moco import MoCo, MoCoConfig, albef
from fastvlp.objectives.objective import combine
from tests.made import made_batch, made_config, made_tokenizer

E = 8


def towers(seed: int = 0) -> VLModel:
    torch.manual_seed(seed)
    return VLModel(two_towers(made_config(depth=1), width=E))


def made(model: VLModel, **options) -> MoCo:
    objective = MoCoConfig(**{"queue": 12, "momentum": 0.9} | options).build(model.config, made_tokenizer())
    objective.begin(model)
    return objective


def keys(count: int, seed: int) -> tuple[Tensor, Tensor]:
    draw = torch.randn(2, count, E, generator=torch.Generator().manual_seed(seed))
    return tuple(F.normalize(draw, dim=-1))


def batch_of(rows: int, seed: int = 0):
    return made_batch(lengths=tuple(4 + i % 5 for i in range(rows)), seed=seed)


def step(objective: MoCo, model: VLModel, batch, rate: float = 0.5) -> dict[str, float]:
    """One step of plain SGD."""
    model.zero_grad()
    losses = objective(model, model.encode_image(batch.image), batch)
    combine(losses).backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= rate * parameter.grad
    objective.after_step(model)
    return {name: (loss.weight * loss.total / loss.count).item() for name, loss in losses.items()}


def test_the_queue_is_a_ring_for_batches_of_any_size():
    model = towers()
    objective = made(model, queue=7)
    naive = {"image": objective.image_queue.numpy().copy(), "text": objective.text_queue.numpy().copy()}
    place = 0
    for i, count in enumerate((3, 3, 1, 5, 7, 20, 2)):
        image, text = keys(count, i)
        objective.latest = image, text
        objective.remember()
        for row in range(count):
            naive["image"][place], naive["text"][place] = image[row].numpy(), text[row].numpy()
            place = (place + 1) % 7
        np.testing.assert_array_equal(objective.image_queue.numpy(), naive["image"])
        np.testing.assert_array_equal(objective.text_queue.numpy(), naive["text"])
        assert objective.written.item() % 7 == place
    assert objective.written.dtype == torch.int64 and objective.written.item() == 41


def test_the_queue_begins_as_unit_vectors_of_the_seed():
    one, other = (made(towers(seed)) for seed in (3, 3))
    assert torch.equal(one.image_queue, other.image_queue) and not torch.equal(one.image_queue, one.text_queue)
    torch.testing.assert_close(one.text_queue.norm(dim=1), torch.ones(12))
    assert not torch.equal(one.image_queue, made(towers(4)).image_queue)


@pytest.mark.parametrize("mode", ["pos+queue", "batch+queue"])
def test_the_loss_is_of_momentum_keys_and_the_queue_before_the_step(mode):
    model, batch = towers(), batch_of(3)
    objective = made(model, mode=mode, alpha=0.4 if mode == "batch+queue" else 0.0, weight=0.3)
    with torch.no_grad():
        for parameter in objective.slow.parameters():
            parameter.mul_(1.1)
    before = objective.text_queue.clone(), objective.image_queue.clone()
    states = model.encode_image(batch.image)
    image, text = model.embed_image(states), model.embed_text(batch.ids, batch.length)
    with torch.no_grad():
        slow = objective.slow
        image_key = slow.embed_image(slow.encode_image(batch.image))
        text_key = slow.embed_text(batch.ids, batch.length)
    losses = objective(model, states, batch)
    for name, query, key, queue, own in (
        ("image", image, text_key, before[0], image_key),
        ("text", text, image_key, before[1], text_key),
    ):
        if mode == "pos+queue":
            logits = torch.cat([(query * key).sum(1, keepdim=True), query @ queue.T], 1) / 0.07
            known = F.cross_entropy(logits, torch.zeros(3, dtype=torch.long), reduction="sum")
        else:
            every = torch.cat([key, queue])
            soft = 0.4 * (own @ every.T / 0.07).softmax(1) + 0.6 * torch.eye(3, 15)
            known = -(soft * (query @ every.T / 0.07).log_softmax(1)).sum()
        torch.testing.assert_close(losses[name].total, known, rtol=1e-5, atol=1e-5)
        assert losses[name].count == 3 and losses[name].weight == 0.3
    assert torch.equal(objective.text_queue, before[0]), "the queue is written after the step"
    mean = made(model, mode=mode, directions="mean")(model, states, batch)
    assert {loss.weight for loss in mean.values()} == {0.5}
    objective.after_step(model)
    torch.testing.assert_close(objective.image_queue[:3], image_key)
    torch.testing.assert_close(objective.text_queue[:3], text_key)


def test_the_copy_has_the_towers_and_heads_alone_and_no_gradients():
    torch.manual_seed(0)
    config = made_config(depth=1, separate_heads=True)
    model = VLModel(replace(config, embed=two_towers(config, width=E).embed))
    objective = made(model)
    names = {name for name, _ in objective.slow.named_parameters()}
    assert {name.split(".")[0] for name in names} == {"image", "text", "embed"}
    assert names == {name for name, _ in model.named_parameters() if name.startswith(("image.", "text.", "embed."))}
    step(objective, model, batch_of(3))
    assert all(p.grad is None and not p.requires_grad for p in objective.slow.parameters())
    assert model.fusion.blocks and model.head.vocabulary, "the model keeps what the copy leaves out"


def test_the_copy_follows_by_an_average_in_place():
    model = towers()
    objective = made(model)
    start = {name: p.clone() for name, p in objective.slow.named_parameters()}
    storage = [p.data_ptr() for p in objective.slow.parameters()]
    wanted = {name: p.double() for name, p in start.items()}
    for i in range(3):
        step(objective, model, batch_of(4, seed=i))
        wanted = {name: 0.9 * x + 0.1 * model.get_parameter(name).double() for name, x in wanted.items()}
    for name, parameter in objective.slow.named_parameters():
        torch.testing.assert_close(parameter.double(), wanted[name], rtol=0, atol=1e-6)
    assert storage == [p.data_ptr() for p in objective.slow.parameters()]


def test_following_after_a_step_is_following_before_the_keys_of_the_next():
    """BriVL's order: queries, copy follows, keys, losses, queues. The copy ends one move ahead, and nothing else differs."""
    ours, theirs = towers(), towers()
    mine, known = made(ours), made(theirs)
    known.load_state_dict(mine.state_dict())
    for i in range(3):
        batch = batch_of(4, seed=i)
        means = step(mine, ours, batch)
        theirs.zero_grad()
        known.follow(theirs)
        losses = known(theirs, theirs.encode_image(batch.image), batch)
        combine(losses).backward()
        known.remember()
        with torch.no_grad():
            for parameter in theirs.parameters():
                if parameter.grad is not None:
                    parameter -= 0.5 * parameter.grad
        assert means == {name: (loss.total / loss.count).item() for name, loss in losses.items()}
    assert all(torch.equal(*pair) for pair in zip(ours.parameters(), theirs.parameters()))
    assert torch.equal(mine.image_queue, known.image_queue) and torch.equal(mine.text_queue, known.text_queue)
    known.follow(theirs)
    assert all(torch.equal(*pair) for pair in zip(mine.slow.parameters(), known.slow.parameters()))


def test_a_frozen_trunk_is_shared_and_follows_nothing():
    model = towers()
    model.image.requires_grad_(False)
    objective = made(model)
    shared = {name for name, p in objective.slow.named_parameters() if p is model.get_parameter(name)}
    assert shared == {name for name, _ in model.named_parameters() if name.startswith("image.")}
    before = [p.clone() for p in model.image.parameters()]
    step(objective, model, batch_of(3))
    assert all(torch.equal(*pair) for pair in zip(before, model.image.parameters()))
    other = made(towers(1))
    other.load_state_dict(objective.state_dict())  # a checkpoint has both names


@pytest.mark.parametrize(("policy", "wanted"), [("copy", 5.0), ("own", 1.0)])
def test_buffers_are_copied_or_the_copys_own(policy, wanted):
    model = towers()
    model.text.register_buffer("statistic", torch.tensor(1.0))
    objective = made(model, buffers=policy)
    model.text.statistic += 4
    step(objective, model, batch_of(3))
    assert objective.slow.text.statistic == wanted and model.text.statistic == 5.0


def test_a_batch_of_one_learns_from_the_queue():
    model = towers()
    objective = made(model)
    assert all(loss > 0 for loss in step(objective, model, batch_of(1)).values())
    assert objective.written == 1


def test_a_warm_queue_counts_what_was_written():
    model, batch = towers(), batch_of(3)
    # The same batch again: by default its keys would be left out.
    objective = made(model, warm=True, queue=5, equal_pairs="negatives")
    losses = step(objective, model, batch)
    assert losses == {"image": 0.0, "text": 0.0}, "one's own key alone"
    written = objective.text_queue[:3].clone()
    objective.text_queue[3:] = torch.nan
    objective.image_queue[3:] = torch.nan
    image = model.embed_image(model.encode_image(batch.image))
    total = objective(model, model.encode_image(batch.image), batch)["image"].total
    slow = objective.slow.embed_text(batch.ids, batch.length)
    logits = torch.cat([(image * slow).sum(1, keepdim=True), image @ written.T], 1) / 0.07
    torch.testing.assert_close(total, F.cross_entropy(logits, torch.zeros(3, dtype=torch.long), reduction="sum"))
    objective.after_step(model)
    assert objective.written == 6 and torch.isfinite(objective.image_queue).all()


@pytest.mark.parametrize("config", [MoCoConfig(queue=12), albef(queue=12), MoCoConfig(queue=12, warm=True)])
def test_validation_contrasts_the_rows_of_a_batch_and_leaves_the_queue_alone(config):
    model, batch = towers(), batch_of(3)
    objective = config.build(model.config, made_tokenizer()).eval()
    objective.begin(model)
    before = {name: x.clone() for name, x in objective.state_dict().items()}
    losses = objective(model, model.encode_image(batch.image), batch)
    image = model.embed_image(model.encode_image(batch.image))
    text = model.embed_text(batch.ids, batch.length)
    for name, logits in (("image", image @ text.T / 0.07), ("text", text @ image.T / 0.07)):
        known = F.cross_entropy(logits, torch.arange(3), reduction="sum")
        torch.testing.assert_close(losses[name].total, known)
    assert objective.latest is None
    objective.remember()
    assert all(torch.equal(x, objective.state_dict()[name]) for name, x in before.items())


def test_a_learned_temperature_stays_within_its_bounds():
    model = towers()
    objective = albef(queue=12).build(model.config, made_tokenizer())
    objective.begin(model)
    for value, bound in ((0.7, 0.5), (-1.0, 0.001), (0.2, 0.2)):
        objective.temperature.data.fill_(value)
        objective.after_step(model)
        assert objective.temperature.item() == pytest.approx(bound)
    combine(objective(model, model.encode_image(batch_of(3).image), batch_of(3))).backward()
    assert objective.temperature.grad.abs() > 0
    fixed = made(model)
    combine(fixed(model, model.encode_image(batch_of(3).image), batch_of(3))).backward()
    assert fixed.temperature.grad is None and fixed.temperature.item() == pytest.approx(0.07)


def test_keys_of_masked_images_are_of_the_queries_patches():
    model, batch = towers(), batch_of(3)
    whole, half = made(model), made(model, key_keep=0.5)
    assert not torch.allclose(whole.constants(model, batch)[0], half.constants(model, batch)[0])
    assert torch.equal(whole.constants(model, batch)[1], half.constants(model, batch)[1])
    seen: list[Tensor] = []
    half.slow.image.patch.register_forward_hook(lambda *args: seen.append(args[-1]))
    half.constants(model, batch)
    assert seen[0].shape[1] == 2
    keep = random_keep(batch.seed, 4, 0.5)
    query = model.embed_image(model.encode_image(batch.image, keep))
    torch.testing.assert_close(half.constants(model, batch)[0], query)


def test_what_is_kept_with_the_weights_is_small():
    assert set(made(towers()).kept()) == {"temperature"}
    assert {"image_queue", "text_queue", "written", "temperature"} < set(made(towers()).state_dict())


def test_options_that_cannot_be_are_refused():
    for options, message in (
        ({"queue": 0}, "queue"),
        ({"momentum": 1.2}, "momentum"),
        ({"temperature": 0.0}, "temperature"),
        ({"alpha": 0.4}, r"batch\+queue"),
        ({"key_keep": 0.0}, "key_keep"),
    ):
        with pytest.raises(ValueError, match=message):
            MoCoConfig(**options)
    with pytest.raises(UserError, match=r"`model\.embed`"):
        MoCoConfig().build(made_config(), made_tokenizer())
