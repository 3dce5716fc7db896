"""What is said of pairs of scenes in the embedded corpus: true of one pair and false of another, so that the text alone
tells nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from random import Random

from fastvlp.data.world.language import Phrase, Saying
from fastvlp.data.world.scene import Kind
from fastvlp.data.world.sentences import phrases

# Whether a form holds of a phrase that fits a things on the left and b on the right; n is the number it names.
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


def _pair_claims(phrase: Phrase, first: tuple[int, int], second: tuple[int, int]) -> Iterator[tuple[Saying, bool]]:
    """What holds of one pair and not of the other, by how many things the phrase fits in their images."""
    for form, holds in _PAIR_FORMS.items():
        numbers = {*first, *second, sum(first), sum(second)} - {0} if form in _NUMBERED else {0}
        for n in sorted(numbers):
            truth = holds(*first, n)
            if truth == holds(*second, n):
                continue
            if form in _PLURAL:
                yield (form, phrase._replace(number=None)), truth
            elif form in _NUMBERED:
                yield (form, phrase._replace(number=n, means="exact")), truth
            else:
                yield (form, phrase), truth


def pair_sayings(
    rng: Random, first: Sequence[Sequence[Kind]], second: Sequence[Sequence[Kind]], count: int = 4
) -> list[tuple[Saying, bool]]:
    """Up to `count` sayings, each of another form, true of one pair and false of the other; the label is `first`'s."""
    kinds = [kind for side in (*first, *second) for kind in side]
    asked = [
        phrase._replace(number=1, means="some")
        for keys in (("colour", "shape"), ("shape",), ("colour",))
        for phrase in phrases(kinds, *keys)
    ]
    by_form: dict[str, list[tuple[Saying, bool]]] = {}
    for phrase in asked:
        l1, r1, l2, r2 = (sum(map(phrase.fits, side)) for side in (*first, *second))
        for saying, truth in _pair_claims(phrase, (l1, r1), (l2, r2)):
            by_form.setdefault(saying[0], []).append((saying, truth))
    return [rng.choice(by_form[form]) for form in rng.sample(sorted(by_form), min(count, len(by_form)))]
