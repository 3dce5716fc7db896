"""What is said and asked of single scenes of the embedded corpus: captions, questions, statements.

All of it is true by construction; questions and statements are drawn so that the text alone does not give the answer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise
from random import Random

from fastvlp.data.world.language import Language, Phrase, Saying
from fastvlp.data.world.scene import COLOURS, RADII, SHAPES, Kind, Scene, Thing, allowed, edit_kinds, relation

Question = tuple[str, Saying, str]  # kind, what is asked, answer
OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}


def phrases(kinds: Iterable[Kind], *keys: str) -> list[Phrase]:
    """What is there, grouped by the named attributes and counted exactly."""
    groups = Counter(tuple(getattr(kind, key) for key in keys) for kind in kinds)
    return [Phrase(number=n, means="counted", **dict(zip(keys, group))) for group, n in groups.items()]


def _caption_list(rng: Random, scene: Scene) -> Saying:
    keys = ("size", "colour", "shape") if rng.random() < 0.4 else ("colour", "shape")
    groups = phrases([thing.kind for thing in scene.things], *keys)
    some = tuple(rng.sample(groups, min(len(groups), rng.choice((2, 3, 4)))))
    plain = ("list", some)
    return rng.choice(
        (plain, plain, ("list-on", some, scene.tone), ("list-patterned", some, scene.tone, scene.pattern))
    )


def _caption_order(rng: Random, scene: Scene) -> Saying | None:
    things = sorted(scene.things, key=lambda thing: thing.x)
    if len(things) > 4 or any(b.x - a.x < 0.08 for a, b in pairwise(things)):
        return None
    return "in-order", tuple(Phrase(colour=t.kind.colour, shape=t.kind.shape) for t in things)


def _some(rng: Random, thing: Thing) -> Phrase:
    size = thing.kind.size if rng.random() < 0.3 else None
    return Phrase(size=size, colour=thing.kind.colour, shape=thing.kind.shape)


def _caption_relation(rng: Random, scene: Scene) -> Saying | None:
    a, *others = rng.sample(scene.things, min(3, len(scene.things)))
    known = [(other, where) for other in others if (where := relation(a, other))]
    if not known:
        return None
    parts = [part for other, where in known for part in (where, _some(rng, other))]
    if len(known) == 2 and rng.random() < 0.4:
        return "relations", _some(rng, a), *parts
    return "relation", _some(rng, a), *parts[:2]


def _caption_counts(rng: Random, scene: Scene) -> Saying | None:
    kinds = [thing.kind for thing in scene.things]
    if rng.random() < 0.4:
        groups = phrases(kinds, "colour", "shape")
        return "among", Phrase(number=len(kinds)), tuple(rng.sample(groups, min(len(groups), 2)))
    by, other = rng.sample(("colour", "shape"), 2)
    wholes = [phrase for phrase in phrases(kinds, by) if phrase.number != 1]
    if not wholes:
        return None
    whole = rng.choice(wholes)
    parts = phrases([kind for kind in kinds if whole.fits(kind)], other)
    if len(parts) == 1:
        return None
    return "split", whole, tuple(part._replace(bare=other == "colour") for part in parts)


def _caption_extremes(rng: Random, scene: Scene) -> Saying | None:
    things = sorted(scene.things, key=lambda thing: RADII[thing.kind.size])
    small, large = Phrase(*(1, None, *things[0].kind[1:])), Phrase(*(1, None, *things[-1].kind[1:]))
    if things[-1].kind.size == things[-2].kind.size:
        return None
    if (len(things) > 2 and things[0].kind.size == things[1].kind.size) or rng.random() < 0.3:
        return "largest", large, "thing"
    return "extremes", large, small, "thing"


def place(thing: Thing) -> str | None:
    """The part of the picture that a thing is in, as a word key; None near a border between parts."""

    def third(at: float) -> int | None:
        return 0 if at < 0.35 else 1 if 0.42 < at < 0.58 else 2 if at > 0.65 else None

    column, row = third(thing.x), third(thing.y)
    if column is None or row is None:
        return None
    name = "-".join(part for part in (("top", "", "bottom")[row], ("left", "", "right")[column]) if part)
    return f"at-{name or 'centre'}"


def _caption_places(rng: Random, scene: Scene) -> Saying | None:
    placed = [(thing, where) for thing in scene.things if (where := place(thing))]
    if len(placed) < 2 or rng.random() < 0.3:
        if not placed:
            return None
        thing, where = rng.choice(placed)
        return "place", _some(rng, thing), where
    (a, at_a), (b, at_b) = rng.sample(placed, 2)
    return "places", _some(rng, a), at_a, _some(rng, b), at_b


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


def _caption_single(rng: Random, scene: Scene) -> Saying:
    phrase = _some(rng, scene.things[0])
    return rng.choice((("single", phrase), ("single-on", phrase, scene.tone)))


def captions(rng: Random, language: Language, scene: Scene, count: int, single: bool = False) -> list[str]:
    """`count` different true captions of a scene, each within the language's limits of length."""
    found: dict[str, None] = {}
    low, high = language.limits
    while len(found) < count:
        saying = (_caption_single if single else rng.choice(_CAPTIONS))(rng, scene)
        if saying and low <= language.length(text := language.say(rng, saying)) <= high:
            found[text] = None
    return list(found)


def _extreme(things: Sequence[Thing], thing: Thing) -> str | None:
    """ "leftmost" and the like, where the next thing is clearly further in."""
    others = [other for other in things if other is not thing]
    for place, inwards in (
        ("leftmost", lambda other: other.x - thing.x),
        ("rightmost", lambda other: thing.x - other.x),
        ("topmost", lambda other: other.y - thing.y),
        ("lowest", lambda other: thing.y - other.y),
    ):
        if all(inwards(other) > 0.1 for other in others):
            return place
    return None


def refer(rng: Random, things: Sequence[Thing], thing: Thing, avoid: str = "", places: bool = False) -> Phrase | None:
    """A definite phrase that fits `thing` alone and does not name the attribute `avoid`; None if there is none."""
    options = []
    for keys in (("shape",), ("colour",), ("colour", "shape"), ("size", "shape"), ("size", "colour"), ("size",)):
        phrase = Phrase(definite=True, **{key: getattr(thing.kind, key) for key in keys})
        if avoid not in keys and sum(phrase.fits(other.kind) for other in things) == 1:
            options.append(phrase)
    place = _extreme(things, thing) if places else None
    if place and (not options or rng.random() < 0.25):
        return Phrase(place=place)
    return rng.choice(options) if options else None


def _attribute(rng: Random, scene: Scene, attribute: str) -> Question | None:
    things = list(scene.things)
    if attribute == "size":
        wanted = rng.choice(sorted({thing.kind.size for thing in things}))
        things = [thing for thing in things if thing.kind.size == wanted]
    thing = rng.choice(things)
    phrase = refer(rng, scene.things, thing, avoid=attribute, places=True)
    if phrase is None:
        return None
    return attribute, (f"q-{attribute}", phrase), str(getattr(thing.kind, attribute))


def _count(rng: Random, scene: Scene, split: str) -> Question:
    """The answer is drawn before the question, so that zero and one do not drown the rest."""
    kinds = [thing.kind for thing in scene.things]
    pairs = {kind[1:] for kind in kinds} | {rng.choice(allowed(split)) for _ in range(2)}
    asked = [Phrase(number=None), *(Phrase(number=None, colour=c, shape=s) for c, s in sorted(pairs))]
    asked += [Phrase(number=None, colour=c) for c in sorted({c for c, _ in pairs})]
    asked += [Phrase(number=None, shape=s) for s in sorted({s for _, s in pairs})]
    by_answer: dict[int, list[Phrase]] = {}
    for phrase in asked:
        by_answer.setdefault(sum(phrase.fits(kind) for kind in kinds), []).append(phrase)
    answer = rng.choice(sorted(by_answer))
    return "count", ("q-count", rng.choice(by_answer[answer])), str(answer)


def _facts(kinds: Sequence[Kind], form: str) -> list[Saying]:
    """What is true of a scene whatever the places of its things: what exists, or how many of them."""
    if form == "exists":
        found = [*phrases(kinds, "colour", "shape"), *phrases(kinds, "size", "colour", "shape")]
        return [(form, phrase._replace(number=1, means="some")) for phrase in found]
    found = [*phrases(kinds, "shape"), *phrases(kinds, "colour"), Phrase(number=len(kinds))]
    return [(form, phrase._replace(means="exact")) for phrase in found]


def _contrast(rng: Random, scene: Scene, split: str, label: bool, form: str) -> Saying | None:
    """Something true of the scene and false of an edit of it, or (label False) the other way round.

    An edit must offer both, or one label would be the more frequent one.
    """
    kinds = [thing.kind for thing in scene.things]
    for _ in range(6):
        here, there = _facts(kinds, form), _facts(edit_kinds(rng, kinds, split), form)
        lost, gained = [fact for fact in here if fact not in there], [fact for fact in there if fact not in here]
        if lost and gained:
            return rng.choice(lost if label else gained)
    return None


def _existence(rng: Random, scene: Scene, split: str) -> Question | None:
    label = rng.random() < 0.5
    fact = _contrast(rng, scene, split, label, "exists")
    return fact and ("existence", ("q-exists", *fact[1:]), "yes" if label else "no")


def _related(rng: Random, scene: Scene) -> tuple[Phrase, str, Phrase] | None:
    for _ in range(4):
        a, b = rng.sample(scene.things, 2)
        first, second, where = refer(rng, scene.things, a), refer(rng, scene.things, b), relation(a, b)
        if first and second and where:
            return first, where, second
    return None


def _relation(rng: Random, scene: Scene) -> Question | None:
    found = _related(rng, scene)
    if found is None:
        return None
    first, where, second = found
    if rng.random() < 0.5:
        return "relation", ("q-where", first, second), where
    if rng.random() < 0.5:
        return "relation", ("q-relation", first, where, second), "yes"
    return "relation", ("q-relation", first, OPPOSITE[where], second), "no"


def _sized(rng: Random, scene: Scene) -> tuple[Phrase, Phrase] | None:
    """Two things, the larger one first."""
    for _ in range(4):
        a, b = sorted(rng.sample(scene.things, 2), key=lambda thing: -RADII[thing.kind.size])
        first, second = (refer(rng, scene.things, thing, avoid="size") for thing in (a, b))
        if first and second and a.kind.size != b.kind.size:
            return first, second
    return None


def _bigger(rng: Random, scene: Scene) -> Question | None:
    found = _sized(rng, scene)
    if found is None:
        return None
    truth, smaller = rng.random() < 0.5, rng.random() < 0.3
    first, second = found if truth != smaller else found[::-1]
    return "comparison", ("q-smaller" if smaller else "q-bigger", first, second), "yes" if truth else "no"


def _more(rng: Random, scene: Scene) -> Question | None:
    attribute, values = rng.choice((("colour", tuple(COLOURS)), ("shape", SHAPES)))
    here = [getattr(thing.kind, attribute) for thing in scene.things]
    one, two = rng.choice(here), rng.choice([*here, rng.choice(values)])
    if here.count(one) == here.count(two):
        return None
    truth, fewer = rng.random() < 0.5, rng.random() < 0.3
    most, least = sorted((one, two), key=here.count, reverse=True)
    names = (most, least) if truth != fewer else (least, most)
    asked = [Phrase(number=None, **{attribute: name}) for name in names]
    return "comparison", ("q-fewer" if fewer else "q-more", *asked), "yes" if truth else "no"


def _same(rng: Random, scene: Scene) -> Question | None:
    """Asked only where both answers could have been had, or "no" would be the more frequent one."""
    attribute = rng.choice(("colour", "shape"))
    found: dict[bool, tuple[Phrase, Phrase]] = {}
    for _ in range(8):
        a, b = rng.sample(scene.things, 2)
        first, second = (refer(rng, scene.things, thing, avoid=attribute) for thing in (a, b))
        if first and second:
            found[getattr(a.kind, attribute) == getattr(b.kind, attribute)] = first, second
    truth = rng.random() < 0.5
    return ("comparison", (f"q-same-{attribute}", *found[truth]), "yes" if truth else "no") if len(found) == 2 else None


def _comparison(rng: Random, scene: Scene) -> Question | None:
    drawn = (draw(rng, scene) for draw in rng.sample((_bigger, _more, _same), 3))
    return next((question for question in drawn if question), None)


def questions(rng: Random, scene: Scene, split: str) -> list[Question]:
    """Up to ten different questions of seven kinds: colour, shape, size, count, existence, relation, comparison."""
    drawn = [
        *(_attribute(rng, scene, attribute) for attribute in ("colour", "colour", "shape", "shape", "size")),
        *(_count(rng, scene, split) for _ in range(2)),
        _existence(rng, scene, split),
        _relation(rng, scene),
        _comparison(rng, scene),
    ]
    return list({question[1]: question for question in drawn if question}.values())


def statements(rng: Random, scene: Scene, split: str) -> list[tuple[Saying, bool]]:
    """Up to four statements, true or false with equal chance; a false one is true of a scene that is one edit away."""
    found: dict[Saying, bool] = {}
    for form in ("exists", "count", "relation", "bigger"):
        label = rng.random() < 0.5
        if form in ("exists", "count"):
            saying = _contrast(rng, scene, split, label, form)
            if saying and form == "exists" and rng.random() < 0.25:
                saying, label = ("none", *saying[1:]), not label
        elif form == "relation":
            related = _related(rng, scene)
            saying = related and ("relative", related[0], related[1] if label else OPPOSITE[related[1]], related[2])
        else:
            sized, smaller = _sized(rng, scene), rng.random() < 0.3
            order = sized and (sized if label != smaller else sized[::-1])
            saying = order and ("smaller" if smaller else "bigger", *order)
        if saying:
            found[saying] = label
    return list(found.items())
