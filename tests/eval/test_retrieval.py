"""Ranks by blocks against sorting the whole matrix."""

from __future__ import annotations

import math

import pytest
import torch

from fastvlp.eval.ranks import ranks, recall, reranked, retrieval, score_shortlists, shortlist, transposed


def of_matrix(score):
    return lambda i, t: score[i, t]


def by_sorting(score, image_of_text):
    """1-based ranks without ties: a loop over queries."""
    image_rank, text_rank = [], []
    for i, row in enumerate(score):
        order = row.argsort(descending=True)
        image_rank.append(1 + int((image_of_text[order] == i).nonzero()[0, 0]))
    for t, column in enumerate(score.T):
        order = column.argsort(descending=True)
        text_rank.append(1 + int((order == image_of_text[t]).nonzero()[0, 0]))
    return image_rank, text_rank


def random_scores(images=23, seed=0, most=4):
    generator = torch.Generator().manual_seed(seed)
    count = torch.randint(1, most + 1, (images,), generator=generator)
    image_of_text = torch.arange(images).repeat_interleave(count)
    image_of_text = image_of_text[torch.randperm(len(image_of_text), generator=generator)]
    score = torch.randn(images, len(image_of_text), generator=generator, dtype=torch.float64)
    return score, image_of_text


@pytest.mark.parametrize("block", [1, 7, 16, 4096])
def test_ranks_by_blocks_are_those_of_sorting(block):
    score, image_of_text = random_scores()
    image_rank, text_rank = ranks(of_matrix(score), image_of_text, len(score), block=block)
    assert (image_rank.tolist(), text_rank.tolist()) == by_sorting(score, image_of_text)


def test_unit_vectors_give_the_scores_of_their_products():
    generator = torch.Generator().manual_seed(1)
    image, text = (torch.nn.functional.normalize(torch.randn(n, 16, generator=generator)) for n in (20, 50))
    image_of_text = torch.arange(50) % 20
    expected = recall(*(torch.tensor(r) for r in by_sorting(image @ text.T, image_of_text)))
    for block in (8, 4096):
        found = retrieval(image, text, image_of_text, block=block).scores
        assert found == pytest.approx(expected)
    assert found["recall"] == pytest.approx(
        sum(found[f"{d}/r{k}"] for d in ("image_to_text", "text_to_image") for k in (1, 5, 10)) / 6
    )


def test_ties_count_against_us():
    image_of_text = torch.tensor([0, 0, 1, 2])
    image_rank, text_rank = ranks(of_matrix(torch.zeros(3, 4)), image_of_text, 3)
    assert image_rank.tolist() == [3, 4, 4], "all wrong candidates are ahead, the image's own other caption is not"
    assert text_rank.tolist() == [3, 3, 3, 3]
    assert ranks(of_matrix(torch.full((3, 4), math.nan)), image_of_text, 3)[1].tolist() == [3, 3, 3, 3]


def test_one_nan_is_no_hit():
    score = torch.eye(3)
    score[1, 1] = math.nan
    image_rank, text_rank = ranks(of_matrix(score), torch.arange(3), 3)
    assert image_rank.tolist() == text_rank.tolist() == [1, 3, 1]


def test_equal_captions_tie_wherever_they_stand():
    """Rounding may tell equal vectors apart, which must not: the result would depend on the block."""
    generator = torch.Generator().manual_seed(2)
    image = torch.nn.functional.normalize(torch.randn(64, 33, generator=generator))
    text = image.clone()
    text[1::2] = text[::2]
    found = {block: retrieval(image, text, torch.arange(64), block=block).scores for block in (5, 17, 64)}
    assert found[5] == found[17] == found[64]
    assert found[5]["text_to_image/r1"] == 0.5
    # Of the even images the twin's caption ties with their own; odd ones find another image's caption before their own.
    assert found[5]["image_to_text/r1"] == 0


def test_an_image_without_a_text_has_no_rank():
    with pytest.raises(ValueError, match="needs a text"):
        ranks(of_matrix(torch.zeros(3, 2)), torch.tensor([0, 2]), 3)


@pytest.mark.parametrize("block", [3, 64])
def test_shortlists_are_the_heads_of_sorted_rows(block):
    score, _ = random_scores()
    images, texts = score.shape
    assert (shortlist(of_matrix(score), images, texts, 5, block=block) == score.topk(5, 1).indices).all()
    turned = shortlist(transposed(of_matrix(score)), texts, images, 5, block=block)
    assert (turned == score.T.topk(5, 1).indices).all()
    assert shortlist(of_matrix(score), images, texts, 999, block=block).shape == (images, texts)


def test_reranking_everything_gives_the_ranks_of_the_new_scores():
    """With shortlists as long as the data the towers decide nothing; each pair is scored once, each image met once."""
    score, image_of_text = random_scores()
    new = score[torch.randperm(len(score), generator=torch.Generator().manual_seed(3))].sin()
    images, texts = score.shape
    scored = []

    def score_pairs(texts_of_image):
        assert len(texts_of_image) == images
        for i, its in enumerate(texts_of_image):
            scored.extend((i, int(t)) for t in its)
            yield new[i, its]

    text_IN = shortlist(of_matrix(score), images, texts, texts)
    image_TN = shortlist(transposed(of_matrix(score)), texts, images, images)
    score_IN, score_TN = score_shortlists(text_IN, image_TN, score_pairs)
    assert len(scored) == len(set(scored)) == images * texts
    old = ranks(of_matrix(score), image_of_text, images)
    image_rank = reranked(old[0], score_IN, image_of_text[text_IN] == torch.arange(images)[:, None])
    text_rank = reranked(old[1], score_TN, image_TN == image_of_text[:, None])
    assert (image_rank.tolist(), text_rank.tolist()) == by_sorting(new, image_of_text)


def test_reranking_moves_only_the_shortlist():
    score, image_of_text = random_scores(images=40)
    images, texts = score.shape
    old_image, old_text = ranks(of_matrix(score), image_of_text, images)
    text_IN = shortlist(of_matrix(score), images, texts, 6)
    image_TN = shortlist(transposed(of_matrix(score)), texts, images, 6)
    own_IN, own_TN = image_of_text[text_IN] == torch.arange(images)[:, None], image_TN == image_of_text[:, None]

    def by(new):
        pairs = score_shortlists(text_IN, image_TN, lambda its: [new[i, t] for i, t in enumerate(its)])
        return reranked(old_image, pairs[0], own_IN), reranked(old_text, pairs[1], own_TN)

    # The towers' own scores change nothing, for ranks within the list and behind it.
    same = by(score)
    assert (same[0] == old_image).all() and (same[1] == old_text).all()
    # A perfect model brings every query that the list holds to rank 1, and no other.
    perfect = by((torch.arange(images)[:, None] == image_of_text).double())
    for new, old in zip(perfect, (old_image, old_text)):
        assert (new[old <= 6] == 1).all() and (new[old > 6] == old[old > 6]).all()
    # NaN is last within the list.
    nan = by(torch.full_like(score, math.nan))
    assert (nan[1][old_text <= 6] == 6).all()
