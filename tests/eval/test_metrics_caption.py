"""Scores that pycocoevalcap gave (tests/golden/metrics_caption.json)."""

import json

import pytest

from fastvlp.eval.caption_metrics import WORDS_NOTE, bleu, caption_words, cider, rouge_l
from tests.golden import FOLDER

KNOWN = json.loads((FOLDER / "metrics_caption.json").read_text(encoding="utf-8"))
CANDIDATES = [image["candidate_tokenized"].split() for image in KNOWN["images"]]
REFERENCES = [[text.split() for text in image["references_tokenized"]] for image in KNOWN["images"]]


def test_corpus_scores_are_the_official_ones():
    corpus = KNOWN["corpus"]
    assert bleu(CANDIDATES, REFERENCES) == pytest.approx([corpus[f"Bleu_{n}"] for n in range(1, 5)], abs=1e-6)
    assert rouge_l(CANDIDATES, REFERENCES) == pytest.approx(corpus["ROUGE_L"], abs=1e-6)
    assert cider(CANDIDATES, REFERENCES) == pytest.approx(corpus["CIDEr"], abs=1e-6)


@pytest.mark.parametrize("n", range(0, len(CANDIDATES), 7))
def test_scores_of_one_picture(n):
    scores = KNOWN["images"][n]["scores"]
    assert bleu([CANDIDATES[n]], [REFERENCES[n]]) == pytest.approx([scores[f"Bleu_{k}"] for k in range(1, 5)], abs=1e-6)
    assert rouge_l([CANDIDATES[n]], [REFERENCES[n]]) == pytest.approx(scores["ROUGE_L"], abs=1e-6)


def test_own_words_are_the_official_ones_and_so_are_the_scores_of_raw_text():
    for image in KNOWN["images"]:
        assert caption_words(image["candidate"]) == image["candidate_tokenized"].split()
        for raw, tokenised in zip(image["references"], image["references_tokenized"], strict=True):
            assert caption_words(raw) == tokenised.split()
    count = sum(1 + len(image["references"]) for image in KNOWN["images"])
    assert f"{count} of {count} captions" in WORDS_NOTE


def test_words_of_chinese_are_characters():
    assert caption_words("一只猫,坐在 red 沙发上。") == ["一", "只", "猫", "坐", "在", "red", "沙", "发", "上"]
    assert caption_words("The man's DOG—it isn’t big!") == ["the", "man", "'s", "dog", "it", "is", "n't", "big"]


def test_an_empty_caption_scores_nothing():
    references = [[["a", "red", "square"]], [["a", "blue", "circle"]]]
    empty = [[], []]
    assert bleu(empty, references)[3] == pytest.approx(0, abs=1e-6)
    assert rouge_l(empty, references) == cider(empty, references) == 0


def test_the_reference_itself_scores_best():
    references = [[["a", "large", "red", "square"]], [["a", "small", "blue", "circle"]]]
    own = [its[0] for its in references]
    assert bleu(own, references) == pytest.approx([1, 1, 1, 1], abs=1e-6)
    assert rouge_l(own, references) == pytest.approx(1)
    assert cider(own, references) == pytest.approx(10)
