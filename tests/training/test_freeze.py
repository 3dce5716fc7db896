"""Parts of a model that stay as they are."""

from __future__ import annotations

import pytest
import torch

from fastvlp.errors import UserError
from fastvlp.training.loop import start, steps, train
from tests.training.runs import made_pairs, made_run, weights


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return made_pairs(tmp_path_factory.mktemp("pairs"))


def test_frozen_parts_stay_and_the_others_move(pairs, tmp_path):
    state = start(
        made_run(pairs, tmp_path, "clip", steps=2, freeze=("image.patch", "text.word.weight", "text.blocks.0"))
    )
    before = weights(state)
    list(steps(state))
    moved = {name for name, value in weights(state).items() if not torch.equal(value, before[name])}
    still = {
        name for name in before if name.startswith(("model.image.patch.", "model.text.word.", "model.text.blocks.0."))
    }
    assert still and not moved & still
    assert {"model.image.blocks.0.mlp_in.weight", "model.text.position.weight", "model.embed.image.out.weight"} <= moved
    trained = {id(p) for group in state.optimiser.param_groups for p in group["params"]}
    assert trained == {id(p) for p in state.pretraining.parameters() if p.requires_grad}


def test_a_name_is_of_a_whole_part(pairs, tmp_path):
    with pytest.raises(UserError, match=r"no text\.block; it has image, text, .*text\.blocks\.0"):
        start(made_run(pairs, tmp_path, "clip", freeze=("text.block",)))


def test_nothing_left_to_train_is_said(pairs, tmp_path):
    with pytest.raises(UserError, match="nothing is left to train"):
        start(made_run(pairs, tmp_path, "mlm", freeze=("image", "text", "fusion", "head", "reconstructor")))


def test_a_resumed_run_stays_frozen(pairs, tmp_path):
    run = made_run(pairs, tmp_path, "mlm", steps=2, freeze=("image",))
    train(run)
    with pytest.raises(UserError, match=r"freeze: \['image'\] then"):
        train(made_run(pairs, tmp_path, "mlm", steps=4), resume=True)
    state = train(made_run(pairs, tmp_path, "mlm", steps=4, freeze=("image",)), resume=True)
    assert not any(p.requires_grad for p in state.model.image.parameters())
