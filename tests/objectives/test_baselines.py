"""MLM, AR, PrefixLM and ITM: rates, what a prediction may see, counts, and that the batch around a row is nothing to it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastvlp.batch import Batch
from fastvlp.errors import UserError
from fastvlp.objectives.ar import AR, ARConfig
from fastvlp.objectives.flm import FLM, FLMConfig
from fastvlp.objectives.itm import ITM, ITMConfig
from fastvlp.objectives.mlm import MLM, MLMConfig
from fastvlp.objectives.objective import Objective
from fastvlp.objectives.prefixlm import PrefixLM, PrefixLMConfig
from tests.made import SPECIALS, made_batch, made_config, made_model, made_tokenizer


def mlm(**options) -> MLM:
    return MLMConfig(**options).build(made_config(), made_tokenizer())


def many(length: int = 22, rows: int = 2000) -> Batch:
    return made_batch(lengths=(length,) * rows, size=8)


@pytest.mark.parametrize("rate", [0.15, 0.4, 0.8])
def test_mask_rate(rate: float):
    corrupted, asked = mlm(mask_rate=rate, whole_word=False).draw(many())
    assert corrupted[:, 1:-1].float().mean().item() == pytest.approx(rate, abs=0.015)
    assert torch.equal(corrupted, asked)
    assert not corrupted[:, [0, -1]].any(), "<s> and </s> are never masked"


def test_prediction_rate_is_apart_from_mask_rate():
    corrupted, asked = mlm(mask_rate=0.4, predict_rate=0.1, whole_word=False).draw(many())
    assert corrupted[:, 1:-1].float().mean().item() == pytest.approx(0.4, abs=0.015)
    assert asked[:, 1:-1].float().mean().item() == pytest.approx(0.1, abs=0.015)
    assert (asked <= corrupted).all()


def test_80_10_10():
    objective, batch = mlm(mask_rate=0.5, whole_word=False), many()
    corrupted, _ = objective.draw(batch)
    ids = objective.corrupt(batch, corrupted)[corrupted]
    true = batch.ids[corrupted]
    assert (ids == SPECIALS["mask"]).float().mean().item() == pytest.approx(0.8, abs=0.01)
    random = (ids != SPECIALS["mask"]) & (ids != true)
    assert random.float().mean().item() == pytest.approx(0.1 * 35 / 36, abs=0.01)
    assert ids[random].min() > max(SPECIALS.values()), "a random word is never a special token"
    assert torch.equal(objective.corrupt(batch, corrupted)[~corrupted], batch.ids[~corrupted])


def test_whole_words_are_masked_together_at_the_same_rate():
    objective, batch = mlm(mask_rate=0.4), many()
    corrupted, _ = objective.draw(batch)
    starts = made_tokenizer().starts_word[batch.ids]
    for i in range(2, 21):
        inside = ~starts[:, i]
        assert torch.equal(corrupted[inside, i], corrupted[inside, i - 1])
    assert corrupted[:, 1:-1].float().mean().item() == pytest.approx(0.4, abs=0.02)


def test_every_text_is_asked_for_something():
    batch = many(length=3)
    for options in ({"mask_rate": 0.01}, {"mask_rate": 0.4, "predict_rate": 0.01}):
        assert mlm(**options).draw(batch)[1].any(1).all()


def test_an_empty_text_asks_mlm_for_nothing():
    batch, model = made_batch(lengths=(2, 2)), made_model()
    loss = mlm()(model, model.encode_image(batch.image), batch)["masked"]
    assert loss.count == 0 and loss.total == 0


def test_mlm_refuses_rates_that_cannot_be():
    for options in ({"mask_rate": 0.0}, {"mask_rate": 0.4, "predict_rate": 0.5}, {"keep_mask": 0.95}):
        with pytest.raises(ValueError):
            MLMConfig(**options)


@pytest.mark.parametrize(("bos", "targets"), [("blind", 8), ("official", 7)])
def test_ar_sees_the_past_only(bos, targets):
    """Changing token j changes no prediction of a token at or before j, and every one after."""
    model, batch = made_model().double(), made_batch(lengths=(9,))
    image = model.encode_image(batch.image)
    mask = None
    if bos == "official":
        from fastvlp.model.masks import causal_official

        mask = causal_official(batch.length, 9)
    assert AR(ARConfig(bos=bos)).counts(batch)["next"] == targets
    before = model.read(image, batch.ids, mask=mask, causal=mask is None)
    for j in range(1, 9):
        ids = batch.ids.clone()
        ids[0, j] = (ids[0, j] + 1) % 30 + 4
        after = model.read(image, ids, mask=mask, causal=mask is None)
        same = (before == after).all(-1)[0]
        first = 0 if bos == "blind" else 1
        assert same[first:j].all() and not same[j:].any()
        assert bool(same[0]) == (bos == "blind")


@pytest.mark.parametrize("rate", [0.25, 0.5, 1.0])
def test_prefixlm_rates(rate: float):
    """r_pred = r and mean r_corr = r/2 + 1/(2M) (arXiv 2303.14038 Fig. 2)."""
    M = 20
    batch = made_batch(lengths=(M + 1,) * 4)
    objective = PrefixLM(PrefixLMConfig(suffix_rate=rate))
    asked = objective._targets(batch)
    assert (asked.sum(1) == round(rate * M)).all()
    P = objective.prefix(batch)
    hidden = [(M - i) / M for i in range(int(P[0]), M)]  # the token after position i sees i tokens
    assert sum(hidden) / len(hidden) == pytest.approx(rate / 2 + 1 / (2 * M))


def test_prefixlm_sees_the_prefix_both_ways_and_the_rest_causally():
    model, batch = made_model().double(), made_batch(lengths=(9,))
    objective = PrefixLM(PrefixLMConfig(suffix_rate=0.5))
    P = int(objective.prefix(batch)[0])
    from fastvlp.model import masks

    mask = masks.prefix(batch.length, objective.prefix(batch), 9)
    image = model.encode_image(batch.image)
    before = model.read(image, batch.ids, mask=mask)
    for j in range(9):
        ids = batch.ids.clone()
        ids[0, j] = (ids[0, j] + 1) % 30 + 4
        same = (before == model.read(image, ids, mask=mask)).all(-1)[0]
        if j <= P:
            assert not same.any()
        else:
            assert same[:j].all() and not same[j:].any()


def test_prefix_share_is_drawn_uniformly_by_default():
    batch = many(length=21)
    asked = PrefixLM(PrefixLMConfig())._targets(batch).float().mean(1) * 21 / 20
    assert asked.mean().item() == pytest.approx(0.5, abs=0.03)
    assert asked.min() > 0 and asked.max() == 1.0


def test_itm_takes_other_texts_as_negatives():
    model, batch = made_model(), made_batch(lengths=(9, 4, 7, 6, 8, 5), seed=4)
    image = model.encode_image(batch.image)
    objective = ITM(ITMConfig(candidates=3), made_config())
    other = objective.negatives(model, image, batch)
    assert (other != torch.arange(6)).all()
    loss = objective(model, image, batch)["match"]
    assert loss.count == objective.counts(batch)["match"] == 12
    expected = 0.0
    for b in range(6):
        for text, label in ((b, 1), (int(other[b]), 0)):
            n = int(batch.length[text])
            logits = objective.scores(
                model, image[b : b + 1], batch.ids[text : text + 1, :n], batch.length[text : text + 1]
            )
            expected += F.cross_entropy(logits, torch.tensor([label])).item()
    assert loss.total.item() == pytest.approx(expected, rel=1e-4)


def test_itm_prefers_hard_negatives():
    """With a head that scores every text by one number, the drawn negatives are the higher ones more often."""
    batch = made_batch(lengths=(5,) * 64, seed=9)
    model = made_model()
    image = model.encode_image(batch.image)
    objective = ITM(ITMConfig(candidates=8), made_config())
    scores = torch.linspace(-6, 6, 64)
    objective.scores = lambda m, i, ids, length: torch.stack(  # type: ignore[method-assign]
        [torch.zeros(len(ids)), scores[(ids[:, None] == batch.ids).all(-1).int().argmax(1)]], 1
    )
    hard = scores[objective.negatives(model, image, batch)].mean()
    assert hard > 1.5, "random negatives would average 0"


def test_itm_of_one_pair_is_refused():
    model, batch = made_model(), made_batch(lengths=(5,))
    with pytest.raises(UserError, match=r"`data.batch_size`"):
        ITM(ITMConfig(), made_config())(model, model.encode_image(batch.image), batch)


OBJECTIVES: list[Objective] = [
    mlm(),
    AR(ARConfig()),
    AR(ARConfig(bos="official")),
    PrefixLM(PrefixLMConfig()),
    FLM(FLMConfig(span_mode="uniform", span_rate=0.5)),
]


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: type(o).__name__)
def test_a_row_is_the_same_in_any_batch(objective: Objective):
    """Losses of a batch are the sums of its rows alone: no leak over rows, draws depend on the row's seed only."""
    model, batch = made_model().double(), made_batch(lengths=(9, 4, 7), seed=6)
    together = objective(model, model.encode_image(batch.image), batch)
    counts = objective.counts(batch)
    for name, loss in together.items():
        assert loss.count == counts[name]
        total, count = 0.0, 0
        for row in range(3):
            n = int(batch.length[row])
            one = Batch(
                image=batch.image[row : row + 1],
                ids=batch.ids[row : row + 1, :n],
                length=batch.length[row : row + 1],
                seed=batch.seed[row : row + 1],
            )
            alone = objective(model, model.encode_image(one.image), one)[name]
            total, count = total + alone.total.item(), count + int(alone.count)
        assert count == loss.count and total == pytest.approx(loss.total.item(), rel=1e-10)
