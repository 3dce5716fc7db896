"""Statements about pairs of scenes of the embedded corpus: true of one pair and false of another, so that the text alone does
not give the label."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from random import Random

from fastvlp.data.world.captions_and_questions import phrases
from fastvlp.data.world.language import Meaning, Phrase
from fastvlp.data.world.scene import Look

# Whether a form is true of a phrase that fits a things on the left and b things on the right; n is the number in the form.
_PAIR_FORMS: dict[str, Callable[[int, int, int], bool]] = {
    "p-both": lambda a, b, n: a > 0 and b > 0,
    "p-one": lambda a, b, n: (a > 0) != (b > 0),
    "p-neither": lambda a, b, n: a == 0 and b == 0,
    "p-left-only": lambda a, b, n: a > 0 and b == 0,
    "p-right-only": lambda a, b, n: b > 0 and a == 0,
    "p-left-more": lambda a, b, n: a > b,
    "p-right-more": lambda a, b, n: b > a,
    "p-same": lambda a, b, n: a == b,
    "p-left": lambda a, b, n: a == n,
    "p-right": lambda a, b, n: b == n,
    "p-total": lambda a, b, n: a + b == n,
}
_PLURAL = ("p-left-more", "p-right-more", "p-same")
_NUMBERED = ("p-left", "p-right", "p-total")


def _differences(phrase: Phrase, first: tuple[int, int], second: tuple[int, int]) -> Iterator[tuple[Meaning, bool]]:
    """Statements with the phrase that are true of only one of two pairs, given how many things it fits in their images; and
    whether they are true of the first."""
    for form, holds in _PAIR_FORMS.items():
        numbers = {*first, *second, sum(first), sum(second)} - {0} if form in _NUMBERED else {0}
        for n in sorted(numbers):
            truth = holds(*first, n)
            if truth == holds(*second, n):
                continue
            if form in _PLURAL:
                yield (form, phrase._replace(number=None)), truth
            elif form in _NUMBERED:
                yield (form, phrase._replace(number=n, numeral="exact")), truth
            else:
                yield (form, phrase), truth


def pair_statements(
    rng: Random, first: Sequence[Sequence[Look]], second: Sequence[Sequence[Look]], count: int = 4
) -> list[tuple[Meaning, bool]]:
    """Up to `count` statements, each of another form, that are true of one pair and false of the other; and whether they are
    true of the first."""
    looks = [look for side in (*first, *second) for look in side]
    candidates = [
        phrase._replace(number=1, numeral="some")
        for keys in (("colour", "shape"), ("shape",), ("colour",))
        for phrase in phrases(looks, *keys)
    ]
    by_form: dict[str, list[tuple[Meaning, bool]]] = {}
    for phrase in candidates:
        l1, r1, l2, r2 = (sum(map(phrase.fits, side)) for side in (*first, *second))
        for meaning, truth in _differences(phrase, (l1, r1), (l2, r2)):
            by_form.setdefault(meaning[0], []).append((meaning, truth))
    return [rng.choice(by_form[form]) for form in rng.sample(sorted(by_form), min(count, len(by_form)))]
