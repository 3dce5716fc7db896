"""Pixels of dropped patches: what is asked for, of whom, and what the answer may depend on."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fastvlp.errors import UserError
from fastvlp.model.keep import random_keep
from fastvlp.model.model import VLModel
from fastvlp.model.sizes import two_towers
from fastvlp.objectives.clip import CLIPConfig
from fastvlp.objectives.objective import combine
from fastvlp.objectives.reconstruct import ReconstructConfig, dropped_patches
from fastvlp.training.pretraining import Pretraining
from tests.made import made_batch, made_config, made_tokenizer

SMALL = ReconstructConfig(depth=1, width=16, heads=2)


def pretraining(keep: float = 0.5, decoder: ReconstructConfig = SMALL, class_token: bool = True) -> Pretraining:
    torch.manual_seed(0)
    config = two_towers(made_config(size=32))
    config = replace(config, image=replace(config.image, class_token=class_token))
    objectives = {"pixels": decoder, "clip": CLIPConfig()}
    built = {name: objective.build(config, made_tokenizer()) for name, objective in objectives.items()}
    return Pretraining(VLModel(config), built, keep).double()


def loss_of(module: Pretraining, batch) -> torch.Tensor:
    return module(batch)["pixels/pixels"].total


@pytest.mark.parametrize("class_token", [True, False])
def test_the_loss_is_that_of_each_dropped_patch(class_token):
    module, batch = pretraining(0.25, class_token=class_token), made_batch(lengths=(5, 7, 4), size=32)
    decoder, answers = module.objectives["pixels"], []
    decoder.out.register_forward_hook(lambda *args: answers.append(args[2].detach()))
    loss = module(batch)["pixels/pixels"]
    assert loss.count == 3 and answers[0].shape == (3, 12, 3 * 8 * 8)
    keep = random_keep(batch.seed, 16, 0.25)
    mean, std = module.model.image.mean, module.model.image.std
    total = 0.0
    for row in range(3):
        image = (batch.image[row].double() / 255 - mean) / std
        dropped = sorted(set(range(16)) - set(keep[row].tolist()))
        for place, patch in enumerate(dropped):
            y, x = 8 * (patch // 4), 8 * (patch % 4)
            pixels = image[:, y : y + 8, x : x + 8].flatten()
            pixels = (pixels - pixels.mean()) / (pixels.var() + 1e-6).sqrt()
            total += (answers[0][row, place] - pixels).square().mean().item() / len(dropped)
    assert loss.total.item() == pytest.approx(total, rel=1e-9)


def test_kept_and_dropped_patches_are_all():
    keep = random_keep(torch.arange(50), 49, 0.3)
    both = torch.cat([keep, dropped_patches(keep, 49)], 1).sort(1).values
    assert torch.equal(both, torch.arange(49).expand(50, 49))


def test_the_decoder_knows_where_each_kept_patch_was():
    """An answer depends on the place of what is seen, not on its place among what is kept."""
    module, batch = pretraining(), made_batch(lengths=(5,), size=32)
    decoder, answers = module.objectives["pixels"], []
    decoder.out.register_forward_hook(lambda *args: answers.append(args[2].detach()))
    image = module.encode_image(batch)
    decoder(module.model, image, batch)
    decoder(module.model, torch.cat([image[:, :1], image[:, 1:].flip(1)], 1), batch)
    assert not torch.allclose(*answers)


def test_a_row_answers_alone_as_among_others():
    module, batch = pretraining(), made_batch(lengths=(5, 7, 4), size=32)
    module.objectives.pop("clip")
    tensors = {name: getattr(batch, name) for name in ("image", "ids", "length", "seed")}
    parts = [replace(batch, **{name: rows[i : i + 1] for name, rows in tensors.items()}) for i in range(3)]
    torch.testing.assert_close(sum(loss_of(module, part) for part in parts), loss_of(module, batch))


def test_gradients_reach_both_towers_beside_a_contrastive_loss():
    module, batch = pretraining(decoder=replace(SMALL, weight=0.5)), made_batch(lengths=(5, 7, 4), size=32)
    losses = module(batch)
    assert losses["pixels/pixels"].weight == 0.5
    combine(losses).backward()
    without = [name for name, p in module.named_parameters() if p.grad is None]
    assert not without and module.objectives["pixels"].hidden.grad.any()


def test_with_all_patches_there_is_nothing_to_ask_for():
    with pytest.raises(UserError, match="`keep`"):
        pretraining(keep=1.0)(made_batch(lengths=(5, 7), size=32))


def test_settings_that_cannot_be():
    with pytest.raises(ValueError, match="`width` 18"):
        ReconstructConfig(width=18, heads=2)
