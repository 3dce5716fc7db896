import pytest
import torch

from fastvlp.eval.cloze import cloze, word_positions
from fastvlp.model import masks
from fastvlp.objectives.cloze_methods import predict_causal, predict_masked
from fastvlp.objectives.flm import predict_flm
from tests.made import SPECIALS, made_batch, made_model

LENGTHS = (9, 3, 6, 2)


def test_targets_are_the_words():
    words = word_positions(torch.tensor([5, 2]), 5)
    assert words.tolist() == [[False, True, True, True, False], [False] * 5]


def masked_one_by_one(model, image_BKD, batch):
    predicted = batch.ids.clone()
    for b, n in enumerate(batch.length.tolist()):
        for i in range(1, n - 1):
            ids = batch.ids[b : b + 1, :n].clone()
            ids[0, i] = SPECIALS["mask"]
            state = model.read(image_BKD[b : b + 1], ids, mask=masks.full(torch.tensor([n]), n))
            predicted[b, i] = model.head(state[0, i]).argmax()
    return predicted


def test_masked_rows_equal_one_text_at_a_time():
    model, batch = made_model().eval(), made_batch(lengths=LENGTHS)
    words = word_positions(batch.length, batch.ids.shape[1])
    with torch.no_grad():
        image_BKD = model.encode_image(batch.image)
        expected = masked_one_by_one(model, image_BKD, batch)
        assert predict_masked(model, image_BKD, batch)[words].equal(expected[words])


@pytest.mark.parametrize("rows", [1, 3, 7, 15, 512])
def test_few_rows_at_a_time_give_the_same(rows, monkeypatch):
    model, batch = made_model().eval(), made_batch(lengths=LENGTHS)
    read, most = model.read, []

    def watched(image_BKD, ids, **more):
        most.append(len(ids))
        return read(image_BKD, ids, **more)

    with torch.no_grad():
        image_BKD = model.encode_image(batch.image)
        whole = predict_masked(model, image_BKD, batch)
        monkeypatch.setattr("fastvlp.objectives.cloze_methods.ROWS", rows)
        monkeypatch.setattr(model, "read", watched)
        assert predict_masked(model, image_BKD, batch).equal(whole)
    assert max(most) <= rows and sum(most) == 4 * 7


def test_a_prediction_never_reads_its_own_token():
    model, batch = made_model().eval(), made_batch(lengths=LENGTHS)
    with torch.no_grad():
        image_BKD = model.encode_image(batch.image)
        for predict in (
            lambda b: predict_flm(model, image_BKD, b, "blind"),
            lambda b: predict_masked(model, image_BKD, b),
            lambda b: predict_causal(model, image_BKD, b, "blind"),
        ):
            before = predict(batch)
            for i in (1, 4, 7):
                ids = batch.ids.clone()
                ids[0, i] = 4 + (ids[0, i] - 3) % 36
                changed = type(batch)(image=batch.image, ids=ids, length=batch.length, seed=batch.seed)
                assert predict(changed)[0, i] == before[0, i]


def test_accuracy_counts_every_word_once():
    model = made_model().train()
    batches = [made_batch(lengths=LENGTHS), made_batch(lengths=(4, 4), seed=1)]
    image_BKD = [model.encode_image(batch.image) for batch in batches]
    right = sum(
        int(
            (predict_causal(model, image, batch, "blind") == batch.ids)[
                word_positions(batch.length, batch.ids.shape[1])
            ].sum()
        )
        for image, batch in zip(image_BKD, batches)
    )
    for method in (predict_flm, predict_masked, predict_causal):
        result = cloze(model, method, batches)
        assert result.words == 7 + 1 + 4 + 0 + 2 + 2
        assert 0 <= result.accuracy <= 1
    assert result.accuracy == right / result.words
    assert model.training


def test_a_model_that_knows_the_answer_scores_one():
    """The vocabulary is made to say one word whatever it reads, and that is the only word there is."""
    model = made_model()
    with torch.no_grad():
        model.head.vocabulary.bias[17] = 1e4
    batch = made_batch(lengths=LENGTHS)
    ids = torch.where(word_positions(batch.length, 9), 17, batch.ids)
    batch = type(batch)(image=batch.image, ids=ids, length=batch.length, seed=batch.seed)
    for method in (predict_flm, predict_masked, predict_causal):
        assert cloze(model, method, [batch]).accuracy == 1
