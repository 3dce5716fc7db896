"""Captions, questions and statements about single scenes of the embedded corpus.

Captions and answers are true by construction. Questions and statements are drawn so that the text alone does not give the
answer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise
from random import Random

from fastvlp.data.world.language import Language, Meaning, Phrase
from fastvlp.data.world.levels import RADII
from fastvlp.data.world.scene import Look, Scene, Thing, edit_look, relation

Question = tuple[str, Meaning, str]  # kind, question, answer
# Largest number of draws for each caption of a scene.
_TRIES = 500
OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}


def phrases(looks: Iterable[Look], *keys: str) -> list[Phrase]:
    """Groups things by these attributes, and returns a phrase for each group with the number of its things."""
    groups = Counter(tuple(getattr(look, key) for key in keys) for look in looks)
    return [Phrase(number=n, numeral="counted", **dict(zip(keys, group))) for group, n in groups.items()]


def _caption_list(rng: Random, scene: Scene) -> Meaning:
    keys = ("size", "colour", "shape") if rng.random() < 0.4 else ("colour", "shape")
    groups = phrases([thing.look for thing in scene.things], *keys)
    some = tuple(rng.sample(groups, min(len(groups), rng.choice((2, 3, 4)))))
    plain = ("list", some)
    return rng.choice(
        (plain, plain, ("list-on", some, scene.tone), ("list-patterned", some, scene.tone, scene.pattern))
    )


def _caption_order(rng: Random, scene: Scene) -> Meaning | None:
    things = sorted(scene.things, key=lambda thing: thing.x)
    if len(things) > 4 or any(b.x - a.x < 0.08 for a, b in pairwise(things)):
        return None
    return "in-order", tuple(Phrase(colour=t.look.colour, shape=t.look.shape) for t in things)


def _indefinite(rng: Random, thing: Thing) -> Phrase:
    size = thing.look.size if rng.random() < 0.3 else None
    return Phrase(size=size, colour=thing.look.colour, shape=thing.look.shape)


def _caption_relation(rng: Random, scene: Scene) -> Meaning | None:
    a, *others = rng.sample(scene.things, min(3, len(scene.things)))
    relations = [(other, where) for other in others if (where := relation(a, other))]
    if not relations:
        return None
    parts = [part for other, where in relations for part in (where, _indefinite(rng, other))]
    if len(relations) == 2 and rng.random() < 0.4:
        return "relations", _indefinite(rng, a), *parts
    return "relation", _indefinite(rng, a), *parts[:2]


def _caption_counts(rng: Random, scene: Scene) -> Meaning | None:
    looks = [thing.look for thing in scene.things]
    if rng.random() < 0.4:
        groups = phrases(looks, "colour", "shape")
        return "among", Phrase(number=len(looks)), tuple(rng.sample(groups, min(len(groups), 2)))
    by, other = rng.sample(("colour", "shape"), 2)
    wholes = [phrase for phrase in phrases(looks, by) if phrase.number != 1]
    if not wholes:
        return None
    whole = rng.choice(wholes)
    parts = phrases([look for look in looks if whole.fits(look)], other)
    if len(parts) == 1:
        return None
    return "split", whole, tuple(part._replace(bare=other == "colour") for part in parts)


def _caption_extremes(rng: Random, scene: Scene) -> Meaning | None:
    things = sorted(scene.things, key=lambda thing: RADII[thing.look.size])
    small, large = Phrase(*(1, None, *things[0].look[1:])), Phrase(*(1, None, *things[-1].look[1:]))
    if things[-1].look.size == things[-2].look.size:
        return None
    if (len(things) > 2 and things[0].look.size == things[1].look.size) or rng.random() < 0.3:
        return "largest", large, "thing"
    return "extremes", large, small, "thing"


def place(thing: Thing) -> str | None:
    """Returns the part of the picture that a thing is in, as a key of `Language.words`; None if it is between two parts."""

    def third(at: float) -> int | None:
        return 0 if at < 0.35 else 1 if 0.42 < at < 0.58 else 2 if at > 0.65 else None

    column, row = third(thing.x), third(thing.y)
    if column is None or row is None:
        return None
    name = "-".join(part for part in (("top", "", "bottom")[row], ("left", "", "right")[column]) if part)
    return f"at-{name or 'centre'}"


def _caption_places(rng: Random, scene: Scene) -> Meaning | None:
    placed = [(thing, where) for thing in scene.things if (where := place(thing))]
    if len(placed) < 2 or rng.random() < 0.3:
        if not placed:
            return None
        thing, where = rng.choice(placed)
        return "place", _indefinite(rng, thing), where
    (a, at_a), (b, at_b) = rng.sample(placed, 2)
    return "places", _indefinite(rng, a), at_a, _indefinite(rng, b), at_b


_CAPTIONS = (
    _caption_list,
    _caption_list,
    _caption_list,
    _caption_order,
    _caption_relation,
    _caption_relation,
    _caption_counts,
    _caption_counts,
    _caption_extremes,
    _caption_places,
)


def _caption_single(rng: Random, scene: Scene) -> Meaning:
    phrase = _indefinite(rng, scene.things[0])
    return rng.choice((("single", phrase), ("single-on", phrase, scene.tone)))


def captions(rng: Random, language: Language, scene: Scene, count: int, single: bool = False) -> list[str]:
    """Draws `count` different true captions of a scene, each within the language's limits of length. Returns fewer if the
    language does not have enough words for that many."""
    texts: dict[str, None] = {}
    low, high = language.limits
    for _ in range(_TRIES * count):
        if len(texts) == count:
            break
        meaning = (_caption_single if single else rng.choice(_CAPTIONS))(rng, scene)
        if meaning and low <= language.length(text := language.express(rng, meaning)) <= high:
            texts[text] = None
    return list(texts)


def _extreme(things: Sequence[Thing], thing: Thing) -> str | None:
    """Returns an extreme place that only this thing has, such as "leftmost"; None if another thing is nearly as extreme."""
    others = [other for other in things if other is not thing]
    for place, distance_to in (
        ("leftmost", lambda other: other.x - thing.x),
        ("rightmost", lambda other: thing.x - other.x),
        ("topmost", lambda other: other.y - thing.y),
        ("lowest", lambda other: thing.y - other.y),
    ):
        if all(distance_to(other) > 0.1 for other in others):
            return place
    return None


def unique_phrase(
    rng: Random, things: Sequence[Thing], thing: Thing, avoid: str = "", places: bool = False
) -> Phrase | None:
    """Draws a definite phrase that describes only `thing` and does not name the attribute `avoid`; None if there is none. With
    `places`, the phrase may also name an extreme place, as in "the leftmost thing"."""
    options = []
    for keys in (("shape",), ("colour",), ("colour", "shape"), ("size", "shape"), ("size", "colour"), ("size",)):
        phrase = Phrase(definite=True, **{key: getattr(thing.look, key) for key in keys})
        if avoid not in keys and sum(phrase.fits(other.look) for other in things) == 1:
            options.append(phrase)
    place = _extreme(things, thing) if places else None
    if place and (not options or rng.random() < 0.25):
        return Phrase(place=place)
    return rng.choice(options) if options else None


def attribute_question(rng: Random, scene: Scene, attribute: str) -> Question | None:
    """Asks for the colour, shape or size of a thing. A size is drawn first, so that all sizes are equally frequent answers."""
    things = list(scene.things)
    if attribute == "size":
        wanted = rng.choice(sorted({thing.look.size for thing in things}))
        things = [thing for thing in things if thing.look.size == wanted]
    thing = rng.choice(things)
    phrase = unique_phrase(rng, scene.things, thing, avoid=attribute, places=True)
    if phrase is None:
        return None
    return attribute, (f"q-{attribute}", phrase), str(getattr(thing.look, attribute))


def _count(rng: Random, scene: Scene, split: str) -> Question:
    """Asks how many things there are. The answer is drawn before the question: otherwise most would be zero or one."""
    looks = [thing.look for thing in scene.things]
    pairs = {look[1:] for look in looks} | {rng.choice(scene.level.allowed(split)) for _ in range(2)}
    options = [Phrase(number=None), *(Phrase(number=None, colour=c, shape=s) for c, s in sorted(pairs))]
    options += [Phrase(number=None, colour=c) for c in sorted({c for c, _ in pairs})]
    options += [Phrase(number=None, shape=s) for s in sorted({s for _, s in pairs})]
    by_answer: dict[int, list[Phrase]] = {}
    for phrase in options:
        by_answer.setdefault(sum(phrase.fits(look) for look in looks), []).append(phrase)
    answer = rng.choice(sorted(by_answer))
    return "count", ("q-count", rng.choice(by_answer[answer])), str(answer)


def _facts(looks: Sequence[Look], form: str) -> list[Meaning]:
    """Lists all facts about things with these looks, except about their places: which exist (`exists`), or how many."""
    if form == "exists":
        existing = [*phrases(looks, "colour", "shape"), *phrases(looks, "size", "colour", "shape")]
        return [(form, phrase._replace(number=1, numeral="some")) for phrase in existing]
    counted = [*phrases(looks, "shape"), *phrases(looks, "colour"), Phrase(number=len(looks))]
    return [(form, phrase._replace(numeral="exact")) for phrase in counted]


def _contrast(rng: Random, scene: Scene, label: bool, form: str) -> Meaning | None:
    """Draws a fact that is true of either the scene or an edited copy, but not of both: of the scene if `label`, else of the
    copy.

    An edit is used only if there are facts of both kinds. Otherwise one label would be more frequent.
    """
    looks = [thing.look for thing in scene.things]
    for _ in range(6):
        here, there = _facts(looks, form), _facts(edit_look(rng, looks, scene.level), form)
        lost, gained = [fact for fact in here if fact not in there], [fact for fact in there if fact not in here]
        if lost and gained:
            return rng.choice(lost if label else gained)
    return None


def existence_question(rng: Random, scene: Scene) -> Question | None:
    """Asks whether a thing exists. The thing is either in the scene or in an edited copy, but not in both."""
    label = rng.random() < 0.5
    fact = _contrast(rng, scene, label, "exists")
    return fact and ("existence", ("q-exists", *fact[1:]), "yes" if label else "no")


def _related(rng: Random, scene: Scene) -> tuple[Phrase, str, Phrase] | None:
    """Draws two things a and b. Returns a phrase for a, the side of b that a is on, and a phrase for b."""
    for _ in range(4):
        a, b = rng.sample(scene.things, 2)
        first, second, where = unique_phrase(rng, scene.things, a), unique_phrase(rng, scene.things, b), relation(a, b)
        if first and second and where:
            return first, where, second
    return None


def side_question(rng: Random, scene: Scene) -> Question | None:
    """Asks on which side of one thing another thing is."""
    related = _related(rng, scene)
    return related and ("relation", ("q-where", related[0], related[2]), related[1])


def _relation(rng: Random, scene: Scene) -> Question | None:
    related = _related(rng, scene)
    if related is None:
        return None
    first, where, second = related
    if rng.random() < 0.5:
        return "relation", ("q-where", first, second), where
    if rng.random() < 0.5:
        return "relation", ("q-relation", first, where, second), "yes"
    return "relation", ("q-relation", first, OPPOSITE[where], second), "no"


def _by_size(rng: Random, scene: Scene) -> tuple[Phrase, Phrase] | None:
    """Draws two things of different sizes. Returns a phrase for each, the larger thing first."""
    for _ in range(4):
        a, b = sorted(rng.sample(scene.things, 2), key=lambda thing: -RADII[thing.look.size])
        first, second = (unique_phrase(rng, scene.things, thing, avoid="size") for thing in (a, b))
        if first and second and a.look.size != b.look.size:
            return first, second
    return None


def _bigger(rng: Random, scene: Scene) -> Question | None:
    things = _by_size(rng, scene)
    if things is None:
        return None
    truth, smaller = rng.random() < 0.5, rng.random() < 0.3
    first, second = things if truth != smaller else things[::-1]
    return "comparison", ("q-smaller" if smaller else "q-bigger", first, second), "yes" if truth else "no"


def _more(rng: Random, scene: Scene) -> Question | None:
    attribute, values = rng.choice((("colour", scene.level.colours), ("shape", scene.level.shapes)))
    here = [getattr(thing.look, attribute) for thing in scene.things]
    one, two = rng.choice(here), rng.choice([*here, rng.choice(values)])
    if here.count(one) == here.count(two):
        return None
    truth, fewer = rng.random() < 0.5, rng.random() < 0.3
    most, least = sorted((one, two), key=here.count, reverse=True)
    names = (most, least) if truth != fewer else (least, most)
    plurals = [Phrase(number=None, **{attribute: name}) for name in names]
    return "comparison", ("q-fewer" if fewer else "q-more", *plurals), "yes" if truth else "no"


def _same(rng: Random, scene: Scene) -> Question | None:
    """Asks whether two things share an attribute. Returns a question only if one drawn pair shares it and another does not:
    otherwise the answer "no" would be more frequent."""
    attribute = rng.choice(("colour", "shape"))
    pairs: dict[bool, tuple[Phrase, Phrase]] = {}
    for _ in range(8):
        a, b = rng.sample(scene.things, 2)
        first, second = (unique_phrase(rng, scene.things, thing, avoid=attribute) for thing in (a, b))
        if first and second:
            pairs[getattr(a.look, attribute) == getattr(b.look, attribute)] = first, second
    truth = rng.random() < 0.5
    return ("comparison", (f"q-same-{attribute}", *pairs[truth]), "yes" if truth else "no") if len(pairs) == 2 else None


def comparison_question(rng: Random, scene: Scene) -> Question | None:
    """Compares two things, or the numbers of two kinds of things."""
    drawn = (draw(rng, scene) for draw in rng.sample((_bigger, _more, _same), 3))
    return next((question for question in drawn if question), None)


def questions(rng: Random, scene: Scene, split: str) -> list[Question]:
    """Draws up to ten different questions of seven kinds: colour, shape, size, count, existence, relation, comparison."""
    drawn = [
        *(attribute_question(rng, scene, attribute) for attribute in ("colour", "colour", "shape", "shape", "size")),
        *(_count(rng, scene, split) for _ in range(2)),
        existence_question(rng, scene),
        _relation(rng, scene),
        comparison_question(rng, scene),
    ]
    return list({question[1]: question for question in drawn if question}.values())


def statements(rng: Random, scene: Scene) -> list[tuple[Meaning, bool]]:
    """Draws up to four statements with labels, true or false with equal chance. A false statement about existence or counts is
    true after one change of the scene."""
    labels: dict[Meaning, bool] = {}
    for form in ("exists", "count", "relation", "bigger"):
        label = rng.random() < 0.5
        if form in ("exists", "count"):
            meaning = _contrast(rng, scene, label, form)
            if meaning and form == "exists" and rng.random() < 0.25:
                meaning, label = ("none", *meaning[1:]), not label
        elif form == "relation":
            related = _related(rng, scene)
            meaning = related and ("relative", related[0], related[1] if label else OPPOSITE[related[1]], related[2])
        else:
            things, smaller = _by_size(rng, scene), rng.random() < 0.3
            order = things and (things if label != smaller else things[::-1])
            meaning = order and ("smaller" if smaller else "bigger", *order)
        if meaning:
            labels[meaning] = label
    return list(labels.items())
