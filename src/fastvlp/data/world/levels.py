"""The levels of the embedded corpus: how hard its pictures are to see, and how its questions are drawn.

`standard` is the corpus of the first edition, whose records never change. In `easy` and `hard` the answers to each form of
question are equally frequent, so that its text alone gives little away (`balance.py`).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (222, 28, 36),
    "orange": (250, 138, 16),
    "yellow": (248, 222, 32),
    "green": (34, 158, 56),
    "cyan": (40, 212, 220),
    "blue": (34, 76, 228),
    "purple": (134, 44, 186),
    "pink": (250, 132, 190),
}
SHAPES = ("circle", "square", "triangle", "diamond", "star", "cross", "heart", "ring")
RADII = {"small": 0.11, "medium": 0.16, "large": 0.225}
TONES: dict[str, tuple[int, int, int]] = {
    "white": (248, 248, 248),
    "beige": (224, 210, 184),
    "grey": (150, 152, 154),
    "black": (22, 22, 24),
}
PATTERNS = ("plain", "striped", "dotted", "checked", "shaded")

Combination = tuple[str, str]  # colour, shape


# Compared by identity, so that it can be a key.
@dataclass(frozen=True, kw_only=True, eq=False)
class Level:
    """The content of the scenes of a level.

    Attributes:
        radii: radius of each size, as a share of the picture's side, smallest first.
        least, most: number of things in a scene.
        room: largest share of the picture that the bounding squares of things may fill.
        quarters: whether each thing is in the middle of a quarter of the picture of its own; else anywhere.
        turn: largest angle in radians that a thing is turned by.
        tint: largest change of a colour channel of a thing.
        lines: largest number of stray lines on the ground.
        words, templates: how many synonyms of a word, and how many templates of a sentence, are used at most.
        questions: how many questions of each kind are drawn for a scene, before some are left out to balance the answers; empty
            where they are drawn as in the first edition, without balance.
    """

    name: str
    colours: tuple[str, ...] = tuple(COLOURS)
    shapes: tuple[str, ...] = SHAPES
    radii: Mapping[str, float] = field(default_factory=lambda: RADII)
    least: int = 2
    most: int = 6
    room: float = 0.42
    quarters: bool = False
    turn: float = 0.2
    tint: int = 12
    tones: tuple[str, ...] = tuple(TONES)
    patterns: tuple[str, ...] = PATTERNS
    lines: int = 6
    words: int = 9
    templates: int = 9
    questions: Mapping[str, int] = field(default_factory=dict)

    @cached_property
    def combinations(self) -> tuple[Combination, ...]:
        """The combinations of a colour and a shape."""
        return tuple(itertools.product(self.colours, self.shapes))

    @cached_property
    def held_out(self) -> tuple[Combination, ...]:
        """The combinations that only the test split shows. Each colour is in exactly one and each shape in at least one of
        them, so training shows all of them, and only the combination is new."""
        return tuple((colour, self.shapes[(3 * i + 2) % len(self.shapes)]) for i, colour in enumerate(self.colours))

    @cached_property
    def seen(self) -> tuple[Combination, ...]:
        """The combinations that all splits show."""
        return tuple(pair for pair in self.combinations if pair not in self.held_out)

    def allowed(self, split: str) -> tuple[Combination, ...]:
        """The combinations that a split may show or name."""
        return self.combinations if split == "test" else self.seen


STANDARD = Level(name="standard")
EASY = Level(
    name="easy",
    colours=("red", "yellow", "green", "blue", "purple", "pink"),
    shapes=("circle", "square", "cross", "triangle"),
    radii={"small": 0.13, "large": 0.22},
    most=4,
    room=1.0,
    quarters=True,
    turn=0.05,
    tint=6,
    tones=("white", "black"),
    patterns=("plain",),
    lines=0,
    words=1,
    templates=2,
    questions={"colour": 3, "shape": 3, "count": 5},
)
HARD = Level(
    name="hard",
    radii={"small": 0.075, "medium": 0.11, "large": 0.16},
    least=4,
    most=8,
    patterns=PATTERNS[1:],
    lines=12,
    questions={"colour": 3, "shape": 3, "size": 2, "count": 8, "existence": 1, "relation": 2, "comparison": 1},
)
LEVELS = {level.name: level for level in (EASY, STANDARD, HARD)}
