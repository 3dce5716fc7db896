"""Caption metrics: BLEU, ROUGE-L and CIDEr-D, by the formulas of the official COCO evaluation (pycocoevalcap)."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence

Words = Sequence[str]
Grams = Counter[tuple[str, ...]]

# One Chinese character, or a run of letters and digits that may hold apostrophes and hyphens inside.
_HAN = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_HAN}]|(?:(?![{_HAN}])\w)+(?:['-](?:(?![{_HAN}])\w)+)*")
_CLITIC = re.compile("(?<=.)(n't|'(?:s|re|ve|ll|d|m))$")

# What a reader of a score has to know, since the official tokenizer needs Java.
WORDS_NOTE = (
    "words are split by fastvlp's rules, not by the official PTB tokenizer: they gave the same words for 379 of 379 captions "
    "of COCO, but they drop symbols such as & and %, and split numbers with a point or comma and abbreviations such as U.S., "
    "which the official one keeps; compare with published scores only approximately"
)


def caption_words(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation; each Chinese character is a word. As in the official PTB
    tokenizer, "isn't" is "is n't" and "black-and-white" is one word; WORDS_NOTE says where they differ."""
    words = _WORD.findall(text.lower().replace("\u2019", "'"))
    return [part for word in words for part in _CLITIC.split(word) if part]


def _grams(words: Words, n: int) -> Grams:
    return Counter(zip(*(words[k:] for k in range(n))))


def bleu(candidates: Sequence[Words], references: Sequence[Sequence[Words]], highest: int = 4) -> list[float]:
    """BLEU-1 to BLEU-`highest` of the corpus (Papineni et al. 2002), with the closest reference length.

    Each picture has one candidate, and one or more references. The tiny constants avoid division by zero, as in the official
    code.
    """
    tiny, small = 1e-15, 1e-9
    guessed, correct = [0] * highest, [0] * highest
    length = target = 0
    for candidate, its_references in zip(candidates, references, strict=True):
        length += len(candidate)
        target += min((abs(len(r) - len(candidate)), len(r)) for r in its_references)[1]
        for k in range(highest):
            grams = _grams(candidate, k + 1)
            most: Grams = Counter()
            for reference in its_references:
                most |= _grams(reference, k + 1)
            guessed[k] += grams.total()
            correct[k] += (grams & most).total()
    ratio = (length + tiny) / (target + small)
    brevity = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    scores, product = [], 1.0
    for k in range(highest):
        product *= (correct[k] + tiny) / (guessed[k] + small)
        scores.append(product ** (1 / (k + 1)) * brevity)
    return scores


def _longest_common(a: Words, b: Words) -> int:
    row = [0] * (len(b) + 1)
    for word in a:
        diagonal = 0
        for j, other in enumerate(b, 1):
            diagonal, row[j] = row[j], diagonal + 1 if word == other else max(row[j], row[j - 1])
    return row[-1]


def rouge_l(candidates: Sequence[Words], references: Sequence[Sequence[Words]], beta: float = 1.2) -> float:
    """The mean F-measure of the longest common subsequence (Lin 2004). The best precision and the best recall of a picture
    may come from different references."""
    scores = []
    for candidate, its_references in zip(candidates, references, strict=True):
        common = [_longest_common(candidate, reference) for reference in its_references]
        precision = max(common) / max(1, len(candidate))
        recall = max(c / max(1, len(reference)) for c, reference in zip(common, its_references))
        weighted = recall + beta**2 * precision
        scores.append((1 + beta**2) * precision * recall / weighted if precision and recall else 0.0)
    return sum(scores) / len(scores)


def _vectors(words: Words, documents: Grams, pictures: float) -> list[dict[tuple[str, ...], float]]:
    return [
        {gram: n * (pictures - math.log(max(1, documents[gram]))) for gram, n in _grams(words, k + 1).items()}
        for k in range(4)
    ]


def _norm(values: Iterable[float]) -> float:
    return math.sqrt(sum(value * value for value in values))


def cider(candidates: Sequence[Words], references: Sequence[Sequence[Words]], sigma: float = 6.0) -> float:
    """CIDEr-D (Vedantam et al. 2015, arXiv 1411.5726), times 10, as the COCO evaluation's "CIDEr".

    Document frequencies are counted in the given references, so the score depends on the set of pictures. A set of one
    picture scores 0.
    """
    documents: Grams = Counter()
    for its_references in references:
        documents.update({gram for r in its_references for k in range(4) for gram in _grams(r, k + 1)})
    pictures = math.log(len(references))
    total = 0.0
    for candidate, its_references in zip(candidates, references, strict=True):
        mine = _vectors(candidate, documents, pictures)
        for reference in its_references:
            theirs = _vectors(reference, documents, pictures)
            # The official length is the number of bigrams.
            difference = max(0, len(candidate) - 1) - max(0, len(reference) - 1)
            penalty = math.exp(-(difference**2) / (2 * sigma**2))
            for m, t in zip(mine, theirs):
                norms = _norm(m.values()) * _norm(t.values())
                common = sum(min(value, t[gram]) * t[gram] for gram, value in m.items() if gram in t)
                total += 10 * penalty * (common / norms if norms else common) / (4 * len(its_references))
    return total / len(candidates)
