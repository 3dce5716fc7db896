"""Comparing answers by VQA's official rule (Antol et al. 2015, arXiv 1505.00468; evaluation code GT-Vision-Lab/VQA at
a013f00)."""

from __future__ import annotations

import re
from collections.abc import Sequence

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_DIGIT_COMMA_DIGIT = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
_ARTICLES = {"a", "an", "the"}
_NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {word: str(value) for value, word in enumerate(_NUMBER_WORDS)} | {"none": "0"}

# Words that the official table restores where one of their apostrophes is missing. Words that without it are other words (its,
# were, well, shed) are not in it.
_CONTRACTED = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock
oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's
they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's where'd
where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all
y'all'll y'all'd've you'd you'd've you'll you're you've
"""
_APOSTROPHES = {
    word[: at.start()] + word[at.end() :]: word for word in _CONTRACTED.split() for at in re.finditer("'", word)
} | {"somebody'd": "somebodyd"}


def strip_punctuation(text: str) -> str:
    """Removes punctuation. A mark is deleted where it stands next to a space anywhere in the text, or where the text has
    digit-comma-digit; otherwise it becomes a space. A period is deleted unless a digit follows."""
    out = text
    number = _DIGIT_COMMA_DIGIT.search(text) is not None
    for mark in _PUNCTUATION:
        beside_space = f"{mark} " in text or f" {mark}" in text
        out = out.replace(mark, "" if number or beside_space else " ")
    return _PERIOD.sub("", out)


def normalise_answer(text: str) -> str:
    """The answer as the official evaluation compares it: no punctuation or articles, lower case, digits for number words,
    missing apostrophes restored."""
    words = [_NUMBERS.get(word, word) for word in strip_punctuation(text).lower().split()]
    return " ".join(_APOSTROPHES.get(word, word) for word in words if word not in _ARTICLES)


def vqa_accuracy(predicted: str, answers: Sequence[str]) -> float:
    """Accuracy of an answer, 0 to 1: the mean, over leaving out each person's answer, of min(1, matches among the others / 3).

    As in the official code, both sides are normalised only where the people's answers differ from each other.
    """
    predicted = " ".join(re.split(r"[\n\t]", predicted)).strip()
    if len(set(answers)) > 1:
        answers = [normalise_answer(answer) for answer in answers]
        predicted = normalise_answer(predicted)
    matches = [answer == predicted for answer in answers]
    return sum(min(1.0, (sum(matches) - match) / 3) for match in matches) / len(matches)


def soft_scores(answers: Sequence[str]) -> dict[str, float]:
    """The accuracy of each different answer: the soft targets of training on VQA v2."""
    return {answer: vqa_accuracy(answer, answers) for answer in dict.fromkeys(answers)}
