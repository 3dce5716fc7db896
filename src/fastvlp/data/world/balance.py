"""Questions about scenes whose text alone gives little away: to each form of question all answers are about equally frequent.

For each form, how often each answer is drawn is measured once on scenes of the same level and split. Of the questions that are
drawn for a scene, those with a frequent answer are then kept as rarely as needed. Each is kept or left out by itself, for
keeping one of several would prefer the answers that the others have not.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from functools import lru_cache
from random import Random

from fastvlp.data.world.captions_and_questions import (
    Question,
    attribute_question,
    comparison_question,
    existence_question,
    side_question,
)
from fastvlp.data.world.language import Meaning, Phrase
from fastvlp.data.world.levels import Level
from fastvlp.data.world.scene import Scene, draw_scene

# Scenes on which frequencies are measured.
_SCENES = 500
# An answer that is rarer than this share of the most frequent one is not made as frequent as the others.
_RARE = 0.08
MOST = 10


def _count(rng: Random, scene: Scene) -> Question:
    """Asks how many things there are, or how many of a colour or shape, most often one that is there."""
    look = rng.choice(scene.things).look
    if rng.random() < 0.3:
        look = look._replace(colour=rng.choice(scene.level.colours), shape=rng.choice(scene.level.shapes))
    name = rng.choice(("", "colour", "shape"))
    phrase = Phrase(number=None, **({name: getattr(look, name)} if name else {}))
    return "count", ("q-count", phrase), str(sum(phrase.fits(thing.look) for thing in scene.things))


_DRAW: Mapping[str, Callable[[Random, Scene], Question | None]] = {
    "colour": lambda rng, scene: attribute_question(rng, scene, "colour"),
    "shape": lambda rng, scene: attribute_question(rng, scene, "shape"),
    "size": lambda rng, scene: attribute_question(rng, scene, "size"),
    "count": _count,
    "existence": existence_question,
    "relation": side_question,
    "comparison": comparison_question,
}


def form_of(meaning: Meaning) -> tuple[object, ...]:
    """A question without the values that it names: its form and, where it has one phrase, which attributes that names."""
    form, *phrases = meaning
    return form, *(value is not None for value in phrases[0] if len(phrases) == 1)


def _drawn(rng: Random, scene: Scene) -> list[Question]:
    drawn = (_DRAW[kind](rng, scene) for kind, count in scene.level.questions.items() for _ in range(count))
    return [question for question in drawn if question]


@lru_cache(maxsize=8)
def kept_shares(level: Level, split: str) -> Mapping[tuple[object, ...], Mapping[str, float]]:
    """Returns the share of the drawn questions that is kept, for each form of question and each answer."""
    rng = Random(f"balance/{level.name}/{split}")
    counts: dict[tuple[object, ...], Counter[str]] = defaultdict(Counter)
    for _ in range(_SCENES):
        for _, meaning, answer in _drawn(rng, draw_scene(rng, split, level)):
            counts[form_of(meaning)][answer] += 1
    return {form: _shares(answers) for form, answers in counts.items()}


def _shares(counts: Counter[str]) -> dict[str, float]:
    least = max(min(counts.values()), _RARE * max(counts.values()))
    return {answer: min(1.0, least / count) for answer, count in counts.items()}


def balanced_questions(rng: Random, scene: Scene, split: str) -> list[Question]:
    """Draws up to ten different questions of the kinds of the scene's level."""
    shares = kept_shares(scene.level, split)
    kept: dict[Meaning, Question] = {}
    for question in _drawn(rng, scene):
        _, meaning, answer = question
        if rng.random() < shares.get(form_of(meaning), {}).get(answer, 1.0):
            kept[meaning] = question
    return [kept[meaning] for meaning in rng.sample(list(kept), min(MOST, len(kept)))]
