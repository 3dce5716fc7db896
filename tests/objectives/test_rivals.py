"""CapPa, masked diffusion captioning and SuperCLIP beside references that loop over tokens."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from fastvlp.objectives.cappa import CapPaConfig
from fastvlp.objectives.mdc import MDCConfig
from fastvlp.objectives.superclip import SuperCLIPConfig
from tests.made import SPECIALS, made_batch, made_config, made_model, made_tokenizer

LENGTHS = (5, 9, 3, 7, 6, 4)


def parts(config):
    model = made_model(reconstructor=False).double().eval()
    batch = made_batch(lengths=LENGTHS)
    objective = config.build(model.config, made_tokenizer()).double()
    return objective, model, model.encode_image(batch.image).double(), batch


def row(batch, i):
    n = int(batch.length[i])
    return replace(
        batch,
        image=batch.image[i : i + 1],
        ids=batch.ids[i : i + 1, :n],
        length=batch.length[i : i + 1],
        seed=batch.seed[i : i + 1],
    )


def log_probabilities(model, states, position, head):
    return F.log_softmax(head.vocabulary(head.hidden(states[:, position])), -1)[0]


def test_cappa_predicts_left_to_right_or_all_at_once():
    objective, model, image, batch = parts(CapPaConfig(parallel=0.5))
    parallel = objective.parallel(batch)
    assert parallel.any() and not parallel.all()
    expected = {"next": 0.0, "parallel": 0.0}
    for i in range(len(batch)):
        n = int(batch.length[i])
        ids = batch.ids[i : i + 1, :n]
        for t in range(n - 1):
            if parallel[i]:
                shown = torch.full((1, n - 1), SPECIALS["mask"])
                states = model.read(image[i : i + 1], shown)
            else:
                states = model.read(image[i : i + 1], ids[:, : t + 1], causal=True)
            nll = -log_probabilities(model, states, t, model.causal_head)[ids[0, t + 1]]
            expected["parallel" if parallel[i] else "next"] += nll.item()
    losses = objective(model, image, batch)
    for name, value in expected.items():
        assert losses[name].total.item() == pytest.approx(value, rel=1e-9)
        assert losses[name].count == objective.counts(batch)[name]
    assert sum(loss.count for loss in losses.values()) == sum(LENGTHS) - len(LENGTHS)
    assert {name: loss.weight for name, loss in losses.items()} == {"next": 0.5, "parallel": 0.5}


def test_cappa_reads_no_word_of_a_text_in_parallel():
    objective, model, image, batch = parts(CapPaConfig(parallel=1.0))
    other = replace(batch, ids=torch.where((batch.ids > max(SPECIALS.values())), batch.ids.flip(0) % 5 + 10, batch.ids))
    seen = []
    read = model.read
    model.read = lambda *args, **kwargs: seen.append(read(*args, **kwargs)) or seen[-1]
    for given in (batch, other):
        objective(model, image, given)
    for i, n in enumerate(LENGTHS):
        assert torch.equal(seen[0][i, : n - 1], seen[1][i, : n - 1])


def test_cappa_of_no_parallel_texts_is_ar():
    from fastvlp.objectives.ar import ARConfig

    objective, model, image, batch = parts(CapPaConfig(parallel=0.0))
    ar = ARConfig().build(model.config, made_tokenizer())(model, image, batch)["next"]
    mine = objective(model, image, batch)["next"]
    assert mine.total.item() == pytest.approx(ar.total.item(), rel=1e-12) and mine.count == ar.count


@pytest.mark.parametrize("weighted", [True, False])
def test_mdc_divides_a_text_by_its_rate(weighted: bool):
    objective, model, image, batch = parts(MDCConfig(weighted=weighted))
    masked, rates, expected = objective.draw(batch), objective.rates(batch), 0.0
    for i in range(len(batch)):
        n = int(batch.length[i])
        ids = batch.ids[i : i + 1, :n].clone()
        hidden = masked[i, :n]
        ids[0, hidden] = SPECIALS["mask"]
        states = model.read(image[i : i + 1], ids)
        for t in hidden.nonzero().flatten().tolist():
            nll = -log_probabilities(model, states, t, model.head)[batch.ids[i, t]].item()
            expected += nll / rates[i].item() if weighted else nll
    loss = objective(model, image, batch)["masked"]
    assert loss.total.item() == pytest.approx(expected, rel=1e-6)
    words = sum(LENGTHS) - 2 * len(LENGTHS)
    assert loss.count == (words if weighted else masked.sum()) == objective.counts(batch)["masked"]


def test_mdc_draws_rates_evenly_and_masks_as_many():
    objective = MDCConfig(least_rate=0.2, most_rate=0.9).build(made_config(), made_tokenizer())
    batch = made_batch(lengths=(42,) * 2000, size=8)
    rates, masked = objective.rates(batch), objective.draw(batch)[:, 1:-1].float().mean(1)
    assert 0.2 < rates.min() < 0.22 and 0.88 < rates.max() <= 0.9
    assert rates.mean().item() == pytest.approx(0.55, abs=0.02)
    assert (masked - rates).mean().abs().item() < 0.01
    # Divided by its rate, each text counts as all its words in the mean.
    assert (masked / rates).mean().item() == pytest.approx(1.0, abs=0.02)


def test_superclip_weighs_words_by_their_rarity():
    objective, model, image, batch = parts(SuperCLIPConfig())
    objective.check(row(batch, i) for i in range(len(batch)))
    words = [{int(x) for x in batch.ids[i, 1 : n - 1]} for i, n in enumerate(LENGTHS)]
    logits = F.log_softmax(objective.words(image.mean(1)), -1)
    expected = 0.0
    for i, own in enumerate(words):
        weights = {w: max(0.0, math.log(len(words) / (1 + sum(w in other for other in words)))) for w in own}
        total = sum(weights.values())
        for w in own:
            target = weights[w] / total if total else 1 / len(own)
            expected -= target * logits[i, w].item()
    loss = objective(model, image, batch)["words"]
    assert loss.total.item() == pytest.approx(expected, rel=1e-6)
    assert loss.count == objective.counts(batch)["words"] == len(words)


def test_superclip_of_an_empty_text_has_no_loss():
    objective, model, _, _ = parts(SuperCLIPConfig())
    batch = made_batch(lengths=(2, 2))
    loss = objective(model, model.encode_image(batch.image).double(), batch)["words"]
    assert loss.count == 0 and loss.total == 0


def test_a_share_of_the_states_is_read_in_training_alone():
    objective, model, _, _ = parts(CapPaConfig())
    # 3 x 3 patches and a class token.
    from fastvlp.training.pretraining import Pretraining

    batch = made_batch(lengths=LENGTHS)
    image = torch.arange(10.0).expand(len(batch), 10).unsqueeze(-1).repeat(1, 1, 32)
    pretraining = Pretraining(
        model, {"cappa": objective, "superclip": SuperCLIPConfig().build(model.config, None)}, keep_states=0.35
    )
    kept = pretraining.train().states_for(objective, image, batch)
    assert kept.shape[1] == 1 + 3 and (kept[:, 0] == 0).all()
    chosen = kept[:, 1:, 0]
    assert (chosen.diff(dim=1) > 0).all() and chosen.min() >= 1 and len({tuple(x.tolist()) for x in chosen}) > 1
    assert pretraining.states_for(pretraining.objectives["superclip"], image, batch) is image
    assert pretraining.eval().states_for(objective, image, batch) is image
