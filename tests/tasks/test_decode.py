import itertools

import pytest
import torch

from fastvlp.model.freezing import evaluating
from fastvlp.objectives.ar import ARConfig
from fastvlp.tasks.caption import CaptionConfig, caption
from fastvlp.tasks.generation import beam_search, greedy, next_scores
from tests.made import SPECIALS, made_batch, made_model, made_tokenizer

PAD, BOS, EOS, MASK = (SPECIALS[name] for name in ("pad", "bos", "eos", "mask"))


@pytest.fixture(scope="module")
def model():
    return made_model(seed=3).eval()


@pytest.fixture(scope="module", name="image_BKD")
def made_images(model):
    with torch.no_grad():
        return model.encode_image(made_batch(lengths=(4, 4, 4, 4, 4)).image)


def uncached(model, image_BKD, most):
    """The same greedy search, everything read again for each token."""
    ids = torch.full((len(image_BKD), 1), BOS)
    done = torch.zeros(len(image_BKD), dtype=torch.bool)
    for _ in range(most):
        with torch.no_grad():
            logits = model.causal_head(model.read(image_BKD, ids, causal=True)[:, -1])
        logits[:, [PAD, BOS, MASK]] = float("-inf")
        token = logits.argmax(-1).masked_fill(done, PAD)
        ids = torch.cat([ids, token[:, None]], 1)
        done |= token == EOS
        if done.all():
            break
    return ids[:, 1:]


@pytest.mark.parametrize("separate_heads", [False, True])
@pytest.mark.parametrize("norm", ["pre", "post"])
def test_cached_decoding_equals_reading_everything_again(norm, separate_heads):
    model = made_model(seed=1, norm=norm, separate_heads=separate_heads).eval()
    image_BKD = model.encode_image(made_batch(lengths=(4, 4, 4)).image).detach()
    assert greedy(model, image_BKD, 12).equal(uncached(model, image_BKD, 12))


def test_the_loss_and_the_decoder_read_the_same_stream(model):
    """The argmax in the caption loss is the token that the decoder writes after the same words."""
    batch = made_batch(lengths=(9, 5, 7))
    with torch.no_grad():
        image_BKD = model.encode_image(batch.image)
        cache = model.begin(image_BKD)
        decoded = torch.stack([next_scores(model, batch.ids[:, i], cache) for i in range(9)], 1)
        logits = model.causal_head(model.read(image_BKD, batch.ids, causal=True))
        logits[..., [PAD, BOS, MASK]] = float("-inf")
        known = logits.log_softmax(-1)
        real = torch.arange(9) < batch.length[:, None] - 1
        assert decoded.argmax(-1)[real].equal(known.argmax(-1)[real])

        objective = CaptionConfig().build(model.config, made_tokenizer())
        loss = objective(model, image_BKD, batch)["next"]
        pretraining = ARConfig().build(model.config, made_tokenizer())(model, image_BKD, batch)["next"]
    assert loss.total == pretraining.total and loss.count == real.sum() == pretraining.count
    # The loss is over the whole vocabulary, the decoder never writes the three it leaves out.
    whole = model.causal_head(model.read(image_BKD, batch.ids, causal=True)).log_softmax(-1)
    nll = -whole[:, :-1].gather(2, batch.ids[:, 1:, None])[..., 0][real[:, :-1]].sum()
    torch.testing.assert_close(loss.total, nll)


def test_one_beam_is_greedy(model, image_BKD):
    for penalty in (0.0, 1.0):
        ids, _ = beam_search(model, image_BKD, 1, 10, penalty)
        assert ids.equal(greedy(model, image_BKD, 10))


def score_of(model, image_KD, words):
    ids = torch.tensor([[BOS, *words]])
    with torch.no_grad():
        logits = model.causal_head(model.read(image_KD[None], ids, causal=True))
    logits[..., [PAD, BOS, MASK]] = float("-inf")
    return logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None]).sum().item()


def real_words(row):
    return [i for i in row.tolist() if i != PAD]


@pytest.mark.parametrize("penalty", [0.0, 0.7])
def test_scores_are_those_of_the_captions(model, image_BKD, penalty):
    ids, scores = beam_search(model, image_BKD, 4, 8, penalty)
    for row, score, image_KD in zip(ids, scores, image_BKD):
        words = real_words(row)
        assert score.item() == pytest.approx(score_of(model, image_KD, words) / len(words) ** penalty, rel=1e-4)
        assert EOS not in words[:-1]


def test_a_wide_beam_finds_the_best_of_all_captions(image_BKD):
    """With as many beams as there are prefixes nothing is lost: the search is exhaustive."""
    model = made_model(seed=3).eval()  # its own, since it is changed
    vocabulary = [EOS, 7, 8, 9]
    with torch.no_grad():
        bias = torch.full_like(model.head.vocabulary.bias, -1e4)
        bias[vocabulary] = model.head.vocabulary.bias[vocabulary]
        model.head.vocabulary.bias.copy_(bias)
    words = vocabulary[1:]
    finished = [[*start, EOS] for n in range(3) for start in itertools.product(words, repeat=n)]
    ids, scores = beam_search(model, image_BKD, 13, 3)
    for row, score, image_KD in zip(ids, scores, image_BKD):
        best = max(finished, key=lambda words: score_of(model, image_KD, words))
        assert real_words(row) == best
        assert score.item() == pytest.approx(score_of(model, image_KD, best), rel=1e-4)


TABLE = {BOS: {4: 0.6, 5: 0.4}, 4: {6: 0.5, 7: 0.5}, 5: {8: 1.0}, 6: {EOS: 1.0}, 7: {EOS: 1.0}, 8: {EOS: 1.0}}


class Chain(torch.nn.Module):
    """Writes words by the table alone: 4 is more probable than 5 at first, but the word after 5 is certain."""

    def __init__(self, model):
        super().__init__()
        self.config, self._begin = model.config, model.begin
        table = torch.full((40, 40), 1e-9)
        for word, following in TABLE.items():
            table[word, list(following)] = torch.tensor(list(following.values()))
        self.table = table.log()

    def begin(self, image_BKD):
        return self._begin(image_BKD)

    def step(self, ids_B, cache):
        return self.table[ids_B]

    def causal_head(self, state):
        return state.clone()


def test_beams_find_a_more_probable_caption_than_greedy(model, image_BKD):
    chain = Chain(model)
    one = greedy(chain, image_BKD, 5)
    ids, scores = beam_search(chain, image_BKD, 2, 5)
    assert real_words(one[0])[0] == 4
    assert real_words(ids[0]) == [5, 8, EOS]
    assert scores[0].exp().item() == pytest.approx(0.4, rel=1e-3)


def test_captions_end_at_the_last_position_at_most(model, image_BKD):
    assert greedy(model, image_BKD, 100).shape[1] <= model.config.text.positions - 1
    ids, _ = beam_search(model, image_BKD, 2, 100)
    assert ids.shape[1] <= model.config.text.positions - 1
    assert greedy(model, image_BKD, 3).shape[1] <= 3


class Words:
    def decode(self, ids):
        return " ".join(str(i) for i in ids if i > 3)


def test_captions_leave_the_model_as_it_was(model):
    batch = made_batch(lengths=(4, 4))
    model.train()
    one = caption(model, Words(), batch.image)
    assert model.training and len(one) == 2
    assert caption(model, Words(), batch.image, beams=1) == one
    model.eval()
    with evaluating(model):
        assert not torch.is_grad_enabled()
