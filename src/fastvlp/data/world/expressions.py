"""What is said of single scenes of the embedded corpus to find one thing, to be judged, or to be chosen from: expressions
that mean one thing alone, statements that no picture can settle, and questions with wrong answers and reasons beside the
right ones. Drawn apart from all other sayings, which so stay what they were."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from random import Random
from typing import NamedTuple

from fastvlp.data.world.language import CHINESE, ENGLISH, Phrase, Saying
from fastvlp.data.world.scene import COLOURS, SHAPES, Scene, Thing, allowed, relation
from fastvlp.data.world.sentences import OPPOSITE, refer

# Nearer than this to a line through the other thing, a person might see either side.
_DOUBT = 0.05

ENGLISH_TOO = replace(
    ENGLISH,
    forms={
        **ENGLISH.forms,
        "the": ("{0}",),
        "the-related": ("{0} {1} {2}", "{0} that is {1} {2}"),
        "n-heavier": ("{0} is heavier than {1}",),
        "n-before": ("{0} was drawn before {1}", "{0} is older than {1}"),
        "n-made": ("{0} is made of paper",),
        "n-outside": ("there is {0} on the back of the picture", "{0} is on the back of the picture"),
    },
)
CHINESE_TOO = replace(
    CHINESE,
    forms={
        **CHINESE.forms,
        "the": ("{0}",),
        "the-related": ("{2}{1}的{0}", "在{2}{1}的{0}"),
        "n-heavier": ("{0}比{1}重",),
        "n-before": ("{0}画得比{1}早", "{0}比{1}旧"),
        "n-made": ("{0}是纸做的",),
        "n-outside": ("图片的背面有{0}", "{0}在图片的背面"),
    },
)


def may_be(where: str, thing: Thing, other: Thing) -> bool:
    """Whether a person could say that the thing is on that side of the other one."""
    dx, dy = thing.x - other.x, thing.y - other.y
    return {"left": -dx, "right": dx, "above": -dy, "below": dy}[where] > -_DOUBT


def _by_place(rng: Random, things: Sequence[Thing], thing: Thing) -> tuple[Phrase, str, Phrase] | None:
    """A phrase that fits several things, of which this one alone is on that side of another."""
    others = [other for other in things if other is not thing]
    for anchor in rng.sample(others, len(others)):
        where, named = relation(thing, anchor), refer(rng, things, anchor)
        if where is None or named is None:
            continue
        for keys in rng.sample(((), ("shape",), ("colour",), ("colour", "shape")), 4):
            phrase = Phrase(definite=True, **{key: getattr(thing.kind, key) for key in keys})
            fitting = [other for other in others if phrase.fits(other.kind)]
            if fitting and not any(may_be(where, other, anchor) for other in fitting if other is not anchor):
                return phrase, where, named
    return None


def expressions(rng: Random, scene: Scene) -> list[tuple[Saying, int]]:
    """For each thing that can be told from all others what means it alone, and the thing's place in the scene."""
    found: list[tuple[Saying, int]] = []
    for at, thing in enumerate(scene.things):
        plain, related = refer(rng, scene.things, thing, places=True), _by_place(rng, scene.things, thing)
        if related and (plain is None or rng.random() < 0.4):
            found.append((("the-related", *related), at))
        elif plain:
            found.append((("the", plain), at))
    return found


def neutrals(rng: Random, scene: Scene, split: str, count: int = 2) -> list[Saying]:
    """Statements about things of the scene that may be true or not: of weight, age, matter, or what is not shown. Their
    words tell them from what can be judged, so that a score should name the labels apart."""
    found: dict[Saying, None] = {}
    for form in rng.sample(("n-heavier", "n-before", "n-made", "n-outside"), 4):
        named = [phrase for thing in rng.sample(scene.things, 2) if (phrase := refer(rng, scene.things, thing))]
        if form == "n-outside":
            colour, shape = rng.choice(allowed(split))
            found[form, Phrase(colour=colour, shape=shape)] = None
        elif form == "n-made" and named:
            found[form, named[0]] = None
        elif len(named) == 2:
            found[form, *named] = None
    return list(found)[:count]


class Choice(NamedTuple):
    """`answers`: words, of which the first is right; `reasons`: sayings, of which the first is why."""

    question: Saying
    answers: tuple[str, ...]
    reasons: tuple[Saying, ...]


def choices(rng: Random, scene: Scene, split: str) -> list[Choice]:
    """A question about a thing's colour and one about a shape, where wrong answers and reasons can be found."""
    drawn = (_choice(rng, scene, split, attribute) for attribute in ("colour", "shape"))
    return [choice for choice in drawn if choice]


def _choice(rng: Random, scene: Scene, split: str, attribute: str) -> Choice | None:
    thing = rng.choice(scene.things)
    asked = refer(rng, scene.things, thing, avoid=attribute, places=True)
    reasons = _reasons(rng, scene, split, thing, attribute)
    if asked is None or reasons is None:
        return None
    right = getattr(thing.kind, attribute)
    here = sorted({getattr(other.kind, attribute) for other in scene.things} - {right})
    values = tuple(COLOURS) if attribute == "colour" else SHAPES
    rest = [value for value in values if value != right and value not in here]
    # What is in the picture is the better wrong answer.
    wrong = [*rng.sample(here, len(here)), *rng.sample(rest, len(rest))][:3]
    return Choice((f"q-{attribute}", asked), (right, *wrong), reasons)


def _placed(rng: Random, things: Sequence[Thing], thing: Thing) -> tuple[Phrase, str, Phrase] | None:
    """What a thing is and where, seen from another one that a phrase means alone."""
    for anchor in rng.sample(things, len(things)):
        where = relation(thing, anchor)
        if where and (named := refer(rng, things, anchor)):
            return Phrase(colour=thing.kind.colour, shape=thing.kind.shape), where, named
    return None


def _reasons(rng: Random, scene: Scene, split: str, thing: Thing, attribute: str) -> tuple[Saying, ...] | None:
    """Where the thing is; then the other side and a thing that is not there, both false, and what is true of another. Beside
    the right answer the last two mostly show by their words: a choice among the rest is right in 46 %
    (bench/grounding_by_expression.py)."""
    things, present = scene.things, {other.kind[1:] for other in scene.things}
    kept = {"colour": 1, "shape": 0}[attribute]
    strange = [pair for pair in allowed(split) if pair not in present and pair[kept] == thing.kind[1:][kept]]
    different = [other for other in things if other.kind[1:] != thing.kind[1:]]
    own, other = (_placed(rng, things, rng.choice(some)) if some else None for some in ([thing], different))
    if own is None or other is None or not strange:
        return None
    phrase, where, named = own
    sides = [
        may_be(OPPOSITE[where], a, b) for a in things for b in things if phrase.fits(a.kind) and named.fits(b.kind)
    ]
    if any(sides):
        return None
    colour, shape = rng.choice(strange)
    absent = Phrase(colour=colour, shape=shape)
    told = ((phrase, where, named), (phrase, OPPOSITE[where], named), (absent, where, named), other)
    return tuple(("relative", *reason) for reason in told)
