"""The share of questions that can be answered from their text alone, to which a score in visual question answering has to be
compared.

The blind answer is that of counting: the most frequent answer of the training questions that begin with the same words. It is
exact and fast, and on the embedded corpus within two points of naive Bayes on words and pairs of words (docs/log.md, entry 37).
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from fastvlp.data.records.schema import answers_fault, clean_text

# The fewest training questions from which an answer is taken: of fewer, the most frequent one is chance.
LEAST = 20
_WORD = re.compile(r"[\u3400-\u9fff]|[^\s\u3400-\u9fff]+")  # a Chinese character is a word


class AnsweredQuestion(NamedTuple):
    """A question and its answers, each with its score in 0..1."""

    text: str
    answers: Mapping[str, float]


class BlindScore(NamedTuple):
    """Mean scores over some questions, in 0..1.

    Attributes:
        blind: of the best answer from the text alone.
        chance: of always giving the answer that is the most frequent one in training.
        questions: how many they are.
    """

    blind: float
    chance: float
    questions: int


def answered_questions(entries: Any) -> Iterator[AnsweredQuestion]:
    """The questions with answers of a record's field; entries of another form are left out."""
    for entry in entries if isinstance(entries, list) else ():
        if not isinstance(entry, Mapping):
            continue
        text, answers = clean_text(entry.get("question")), entry.get("answers")
        if text is not None and isinstance(answers, Mapping) and answers and not answers_fault(answers):
            yield AnsweredQuestion(text, {str(answer): float(score) for answer, score in answers.items()})


def blind_score(train: Sequence[AnsweredQuestion], scored: Sequence[AnsweredQuestion]) -> BlindScore | None:
    """Returns the score that answers can reach from the questions' text alone.

    For each question, take the longest beginning that at least LEAST training questions share with it. The answer is the
    most frequent answer to those training questions. The same is done with the longest common end, and the higher of the two
    scores counts: in Chinese the end of a question says more. Returns None if `train` or `scored` is empty.
    """
    if not train or not scored:
        return None
    return max(_score(train, scored, ends) for ends in (False, True))


def _score(train: Sequence[AnsweredQuestion], scored: Sequence[AnsweredQuestion], ends: bool) -> BlindScore:
    counts = Counter(part for question in train for part in _parts(question.text, ends))
    frequent = {part for part, count in counts.items() if count >= LEAST} | {()}
    totals: dict[tuple[str, ...], dict[str, float]] = {part: defaultdict(float) for part in frequent}
    for question in train:
        for part in _parts(question.text, ends):
            if part in frequent:
                for answer, score in question.answers.items():
                    totals[part][answer] += score
    # Of answers with equal sums the first one by the alphabet, as in `frequent_answers`.
    best = {part: min(answers, key=lambda answer: (-answers[answer], answer)) for part, answers in totals.items()}
    blind = [question.answers.get(best[_longest(question.text, frequent, ends)], 0.0) for question in scored]
    chance = [question.answers.get(best[()], 0.0) for question in scored]
    return BlindScore(sum(blind) / len(blind), sum(chance) / len(chance), len(scored))


def _parts(text: str, ends: bool) -> Iterator[tuple[str, ...]]:
    """Returns all beginnings of a text, or all its ends, shortest first, including the empty one."""
    words = tuple(_WORD.findall(text.lower()))
    for n in range(len(words) + 1):
        yield words[len(words) - n :] if ends else words[:n]


def _longest(text: str, frequent: set[tuple[str, ...]], ends: bool) -> tuple[str, ...]:
    return [part for part in _parts(text, ends) if part in frequent][-1]
