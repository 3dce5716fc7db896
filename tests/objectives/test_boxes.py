"""Masked box regression: what is hidden, what is predicted, and that the loss is that of a loop."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fastvlp.errors import UserError
from fastvlp.model.region_embedding import MEAN_BOX
from fastvlp.objectives.boxes import BoxesConfig
from tests.made import made_config, made_tokenizer
from tests.made_single import region_batch, row_of, single_config, single_model

BATCH = region_batch(lengths=(6, 5, 9), counts=(3, 1, 5))


def built(**options):
    torch.manual_seed(0)
    return BoxesConfig(**options).build(single_config(), made_tokenizer()).double()


def test_the_loss_is_the_summed_error_of_the_edges_of_all_regions():
    model, objective = single_model().double(), built(rate=0.5)
    loss = objective(model, BATCH.regions.feature.double(), BATCH)["edges"]
    total = 0.0
    for b in range(3):
        one = row_of(BATCH, b)
        shown = objective.hidden(one)
        states = model.read_regions(one.regions.feature.double(), shown, one.ids, one.length).region[0]
        for r in range(int(one.regions.count)):
            total += (objective.predict(states[r]) - one.regions.box[0, r]).abs().sum()
    torch.testing.assert_close(loss.total, total)
    assert loss.count == objective.counts(BATCH)["edges"] == 9 and loss.weight == 1


def test_a_hidden_box_says_nothing_and_features_stay():
    model, objective = single_model().double(), built(rate=0.5)
    shown = objective.hidden(BATCH)
    hidden = (shown.box == torch.tensor(MEAN_BOX)).all(-1)
    assert (
        (hidden.sum(1) > 0).all()
        and not hidden[~BATCH.regions.mask].any()
        and torch.equal(shown.mask, BATCH.regions.mask)
    )
    assert torch.equal(shown.feature, BATCH.regions.feature)
    assert torch.equal(shown.box[~hidden], BATCH.regions.box[~hidden])
    moved = replace(
        BATCH,
        regions=replace(BATCH.regions, box=torch.where(hidden[..., None], 0.3 * BATCH.regions.box, BATCH.regions.box)),
    )
    again = objective.hidden(moved)
    assert torch.equal(again.box, shown.box), "what is hidden does not depend on where it is"
    states = [
        model.read_regions(BATCH.regions.feature.double(), part, BATCH.ids, BATCH.length).region
        for part in (shown, again)
    ]
    assert torch.equal(*states)
    share = torch.stack([built(rate=0.3).hidden(replace(BATCH, seed=BATCH.seed + k)).box for k in range(200)])
    rate = (share == torch.tensor(MEAN_BOX)).all(-1)[:, 2].double().mean()
    assert rate.item() == pytest.approx(0.33, abs=0.06)  # at least one of five, so a little more than 0.3


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="share"):
        BoxesConfig(rate=0.0)
    with pytest.raises(UserError, match=r"`model\.single`"):
        BoxesConfig().build(made_config(), made_tokenizer())
    with pytest.raises(UserError, match=r"data\.regions"):
        built().counts(replace(BATCH, regions=None))
