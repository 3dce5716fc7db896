"""Referring expressions, neutral statements and multiple choice about single scenes of the embedded corpus.

They were added after captions, questions and statements, and are drawn separately, so that those stayed as they were.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from random import Random
from typing import NamedTuple

from fastvlp.data.world.captions_and_questions import OPPOSITE, unique_phrase
from fastvlp.data.world.language import CHINESE, ENGLISH, Meaning, Phrase
from fastvlp.data.world.scene import Scene, Thing, relation

# Nearer than this to a line through the other thing, a person might see a thing on either side.
_DOUBT = 0.05

ENGLISH_WITH_EXPRESSIONS = replace(
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
CHINESE_WITH_EXPRESSIONS = replace(
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
    """Whether a person could see the thing on that side of the other one."""
    dx, dy = thing.x - other.x, thing.y - other.y
    return {"left": -dx, "right": dx, "above": -dy, "below": dy}[where] > -_DOUBT


def _by_place(rng: Random, things: Sequence[Thing], thing: Thing) -> tuple[Phrase, str, Phrase] | None:
    """A phrase that fits several things, and the side of another thing that only this one of them is on."""
    others = [other for other in things if other is not thing]
    for anchor in rng.sample(others, len(others)):
        where, named = relation(thing, anchor), unique_phrase(rng, things, anchor)
        if where is None or named is None:
            continue
        for keys in rng.sample(((), ("shape",), ("colour",), ("colour", "shape")), 4):
            phrase = Phrase(definite=True, **{key: getattr(thing.look, key) for key in keys})
            fitting = [other for other in others if phrase.fits(other.look)]
            if fitting and not any(may_be(where, other, anchor) for other in fitting if other is not anchor):
                return phrase, where, named
    return None


def expressions(rng: Random, scene: Scene) -> list[tuple[Meaning, int]]:
    """An expression that means one thing alone, for each thing for which there is one, and the thing's place in the scene."""
    meanings: list[tuple[Meaning, int]] = []
    for at, thing in enumerate(scene.things):
        plain, related = unique_phrase(rng, scene.things, thing, places=True), _by_place(rng, scene.things, thing)
        if related and (plain is None or rng.random() < 0.4):
            meanings.append((("the-related", *related), at))
        elif plain:
            meanings.append((("the", plain), at))
    return meanings


def neutrals(rng: Random, scene: Scene, split: str, count: int = 2) -> list[Meaning]:
    """Statements about things of the scene that no picture can prove or refute: about weight, age, material, or what is not
    shown. Their words give them away, so that a score should be reported for each label."""
    meanings: dict[Meaning, None] = {}
    for form in rng.sample(("n-heavier", "n-before", "n-made", "n-outside"), 4):
        named = [phrase for thing in rng.sample(scene.things, 2) if (phrase := unique_phrase(rng, scene.things, thing))]
        if form == "n-outside":
            colour, shape = rng.choice(scene.level.allowed(split))
            meanings[form, Phrase(colour=colour, shape=shape)] = None
        elif form == "n-made" and named:
            meanings[form, named[0]] = None
        elif len(named) == 2:
            meanings[form, *named] = None
    return list(meanings)[:count]


class Choice(NamedTuple):
    """A question, its answers (keys of `Language.words`) and reasons, the right ones first."""

    question: Meaning
    answers: tuple[str, ...]
    reasons: tuple[Meaning, ...]


def choices(rng: Random, scene: Scene, split: str) -> list[Choice]:
    """Multiple choice about a thing's colour and about a shape, where there are wrong answers and reasons."""
    drawn = (_choice(rng, scene, split, attribute) for attribute in ("colour", "shape"))
    return [choice for choice in drawn if choice]


def _choice(rng: Random, scene: Scene, split: str, attribute: str) -> Choice | None:
    thing = rng.choice(scene.things)
    phrase = unique_phrase(rng, scene.things, thing, avoid=attribute, places=True)
    reasons = _reasons(rng, scene, split, thing, attribute)
    if phrase is None or reasons is None:
        return None
    right = getattr(thing.look, attribute)
    here = sorted({getattr(other.look, attribute) for other in scene.things} - {right})
    values = scene.level.colours if attribute == "colour" else scene.level.shapes
    rest = [value for value in values if value != right and value not in here]
    # A value that another thing in the picture has is the better wrong answer.
    wrong = [*rng.sample(here, len(here)), *rng.sample(rest, len(rest))][:3]
    return Choice((f"q-{attribute}", phrase), (right, *wrong), reasons)


def _placed(rng: Random, things: Sequence[Thing], thing: Thing) -> tuple[Phrase, str, Phrase] | None:
    """A phrase for a thing, and the side of another thing that it is on."""
    for anchor in rng.sample(things, len(things)):
        where = relation(thing, anchor)
        if where and (named := unique_phrase(rng, things, anchor)):
            return Phrase(colour=thing.look.colour, shape=thing.look.shape), where, named
    return None


def _reasons(rng: Random, scene: Scene, split: str, thing: Thing, attribute: str) -> tuple[Meaning, ...] | None:
    """Returns the right reason, where the thing is, and three wrong ones: the opposite side, and a thing that is not there,
    both false; and what is true of another thing. The words of the right answer give away that the last two are wrong:
    choosing among the rest is right in 46 % of cases (bench/grounding_by_expression.py)."""
    things, present = scene.things, {other.look[1:] for other in scene.things}
    kept = {"colour": 1, "shape": 0}[attribute]
    strange = [
        pair for pair in scene.level.allowed(split) if pair not in present and pair[kept] == thing.look[1:][kept]
    ]
    different = [other for other in things if other.look[1:] != thing.look[1:]]
    own, other = (_placed(rng, things, rng.choice(some)) if some else None for some in ([thing], different))
    if own is None or other is None or not strange:
        return None
    phrase, where, named = own
    sides = [
        may_be(OPPOSITE[where], a, b) for a in things for b in things if phrase.fits(a.look) and named.fits(b.look)
    ]
    if any(sides):
        return None
    colour, shape = rng.choice(strange)
    absent = Phrase(colour=colour, shape=shape)
    reasons = ((phrase, where, named), (phrase, OPPOSITE[where], named), (absent, where, named), other)
    return tuple(("relative", *reason) for reason in reasons)
