"""Gradients cached over micro-batches are those of the whole batch: of towers, temperature and bias, under masking too."""

from __future__ import annotations

import pytest
import torch

from fastvlp.errors import UserError
from fastvlp.training.gradient_cache import cache_gradients
from fastvlp.training.loop import global_counts, next_batch, seeded_autocast, start, steps
from tests.training.runs import PAIRED, assert_equal, made_pairs, made_run, weights


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return made_pairs(tmp_path_factory.mktemp("pairs"))


@pytest.mark.parametrize("names", [*((name,) for name in PAIRED), ("mlm", *PAIRED)], ids="-".join)
def test_micro_batches_equal_one_batch(pairs, tmp_path, names):
    whole, parts = (
        start(made_run(pairs, tmp_path / str(n), *names, batch_size=12 // n, accumulate=n, keep=0.5, steps=3))
        for n in (1, 3)
    )
    for one, three in zip(steps(whole), steps(parts)):
        assert one.losses == pytest.approx(three.losses, abs=1e-5)
        assert one.pairs == three.pairs == 12
    assert_equal(weights(whole), weights(parts), 1e-6)


@pytest.mark.parametrize("names", [("clip", "siglip"), ("moco",), ("albef",)], ids="-".join)
def test_micro_batches_of_equal_pairs_equal_one_batch(tmp_path, names):
    """Some records have the caption, or the picture, of a record in another micro-batch."""
    pairs = made_pairs(tmp_path, copies=True)
    whole, parts = (
        start(made_run(pairs, tmp_path / str(n), *names, batch_size=12 // n, accumulate=n, steps=3)) for n in (1, 3)
    )
    for one, three in zip(steps(whole), steps(parts)):
        assert one.losses == pytest.approx(three.losses, abs=1e-5)
        assert one.equal_pairs == three.equal_pairs > 0
    assert_equal(weights(whole), weights(parts), 1e-6)


def test_dropout_is_drawn_the_same_in_both_passes(pairs, tmp_path):
    state = start(made_run(pairs, tmp_path, "clip", batch_size=4, accumulate=2, dropout=0.5))
    batches = state.train.batches()
    micro = [next_batch(state, batches) for _ in range(2)]
    module, counts = state.pretraining.train(), global_counts(state.pretraining, micro)
    cached = cache_gradients(module, micro, counts, lambda i: seeded_autocast(state, i))
    for i, batch in enumerate(micro):
        with seeded_autocast(state, i):
            (loss,) = module(batch, cached.grads[i]).values()
        loss.total.backward()
    found = [p.grad.clone() for p in module.parameters() if p.grad is not None]
    module.zero_grad()
    # The same embeddings, scored with their graphs kept.
    rows = []
    for i, batch in enumerate(micro):
        with seeded_autocast(state, i):
            rows.append(module.objectives["clip"].embed(module.model, module.encode_image(batch), batch))
    losses = module.objectives["clip"].score(*map(torch.cat, zip(*rows)))
    sum(loss.weight * loss.total / len(batch) / 2 for loss in losses.values()).backward()
    wanted = [p.grad for p in module.parameters() if p.grad is not None]
    assert len(found) == len(wanted)
    for mine, known in zip(found, wanted):
        torch.testing.assert_close(mine, known, rtol=1e-5, atol=1e-7)


def test_a_cached_loss_has_no_value(pairs, tmp_path):
    state = start(made_run(pairs, tmp_path, "clip", batch_size=4, accumulate=2))
    report = next(steps(state))
    assert set(report.losses) == {"loss", "clip/image", "clip/text"}
    assert report.losses["loss"] == pytest.approx((report.losses["clip/image"] + report.losses["clip/text"]) / 2)


@pytest.mark.parametrize("name", ["clip", "siglip", "simclr"])
def test_a_batch_of_one_has_nothing_to_tell_apart(pairs, tmp_path, name):
    with pytest.raises(UserError, match=r"only one readable pair; raise `data.batch_size`"):
        next(steps(start(made_run(pairs, tmp_path, name, batch_size=1))))
