"""SimCLR: which images its views are of, what is encoded of them, and that the loss is that of all pairs of views."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from fastvlp.data.augment import AugmentConfig, augment
from fastvlp.errors import UserError
from fastvlp.model.model import VLModel
from fastvlp.model.sizes import brivl_tiny, two_towers
from fastvlp.objectives.simclr import SimCLR, SimCLRConfig
from tests.made import made_batch, made_config, made_tokenizer
from tests.made_single import single_config

CONFIG = SimCLRConfig(width=8, hidden=12, temperature=0.2)
BATCH = made_batch(lengths=(4, 6, 5), size=32)


def made(config: SimCLRConfig = CONFIG, **embed) -> tuple[VLModel, SimCLR]:
    torch.manual_seed(0)
    model = made_config(size=32)
    if embed:
        towers = two_towers(model, width=8)
        model = replace(towers, embed=replace(towers.embed, image=replace(towers.embed.image, **embed)))
    return VLModel(model).double(), config.build(model, made_tokenizer()).double()


def losses(model: VLModel, objective: SimCLR, batch=BATCH):
    return objective(model, torch.empty(0), batch)


def test_the_loss_is_of_each_view_among_all_others():
    model, objective = made(replace(CONFIG, weight=0.5))
    (loss,) = losses(model, objective).values()
    views = [augment(BATCH.image, BATCH.seed, CONFIG.augment, view=view)[0] for view in (1, 2)]
    rows = torch.cat([F.normalize(objective.project(model.encode_image(view).mean(1)), dim=-1) for view in views])
    total = 0.0
    for i in range(6):
        logits = {j: (rows[i] @ rows[j] / 0.2).item() for j in range(6) if j != i}
        total += torch.tensor(list(logits.values())).logsumexp(0).item() - logits[(i + 3) % 6]
    assert loss.total.item() == pytest.approx(total, rel=1e-5)
    assert loss.count == objective.counts(BATCH)["views"] == 6 and loss.weight == 0.5


def test_a_row_is_the_same_in_any_batch():
    model, objective = made()
    whole = objective.embed(model, torch.empty(0), BATCH)
    alone = replace(BATCH, **{name: getattr(BATCH, name)[1:2] for name in ("image", "ids", "length", "seed")})
    for one, many in zip(objective.embed(model, torch.empty(0), alone), whole):
        torch.testing.assert_close(one, many[1:2], rtol=0, atol=1e-3)  # a level of a pixel may round the other way
        assert one.norm().item() == pytest.approx(1)


def test_views_are_of_the_image_before_training_augmented_it():
    model, objective = made()
    first, _ = augment(BATCH.image, BATCH.seed, AugmentConfig(crop=(0.5, 0.5)))
    seen = replace(BATCH, image=first, plain=BATCH.image)
    assert torch.equal(losses(model, objective, seen)["views"].total, losses(model, objective)["views"].total)


def test_views_may_be_masked_each_in_its_own_way():
    model, objective = made(replace(CONFIG, keep=0.25))
    seen = []
    model.image.register_forward_pre_hook(lambda _, args: seen.append(args[1]))
    one, other = objective.embed(model, torch.empty(0), BATCH)
    first, second = seen[0].chunk(2)
    assert first.shape == (3, 4) and not torch.equal(first, second) and not torch.allclose(one, other)


@pytest.mark.parametrize("pool", ["first", "patches", "mean"])
def test_the_projection_reads_what_the_joint_space_reads(pool):
    model, objective = made(pool=pool)
    read = []
    objective.project.register_forward_pre_hook(lambda _, args: read.append(args[0]))
    losses(model, objective)
    view, _ = augment(BATCH.image, BATCH.seed, CONFIG.augment, view=1)
    state = model.encode_image(view)
    wanted = {"first": state[:, 0], "patches": state[:, 1:].mean(1), "mean": state.mean(1)}[pool]
    torch.testing.assert_close(read[0][:3], wanted)


def test_the_image_tower_and_the_projection_alone_learn():
    model, objective = made()
    losses(model, objective)["views"].total.backward()
    assert all(p.grad.any() for p in objective.parameters())
    learns = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert learns == {"image"}


def test_validation_draws_the_same_views():
    model, objective = made()
    objective.eval()
    assert torch.equal(losses(model, objective)["views"].total, losses(model, objective)["views"].total)


def test_what_cannot_be_is_refused():
    with pytest.raises(UserError, match="single stream"):
        CONFIG.build(single_config(), made_tokenizer())
    with pytest.raises(UserError, match=r"no boxes.*`model.embed`"):
        CONFIG.build(brivl_tiny(), made_tokenizer())
    assert CONFIG.build(brivl_tiny(grid=2), made_tokenizer())
    for bad in ({"keep": 0.0}, {"keep": 1.5}, {"temperature": 0.0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            SimCLRConfig(**bad)
