"""The embedded corpus: rendered scenes with captions, objects, questions and statements, for runs without a download.

A record depends only on the corpus's config, its split and its index. The test split has combinations of colour and shape
that train and val neither show nor name (`HELD_OUT`), so a score on it measures generalisation.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import product
from pathlib import Path
from random import Random
from typing import Any, Literal, NamedTuple

from fastvlp.batch import Record
from fastvlp.data.blind import AnsweredQuestion, answered_questions, blind_score
from fastvlp.data.records.shards import ShardWriter
from fastvlp.data.streams import with_progress
from fastvlp.data.world.balance import balanced_questions
from fastvlp.data.world.captions_and_questions import captions, questions, statements
from fastvlp.data.world.corpus_card import claim, read_card, write_card
from fastvlp.data.world.detector import detect
from fastvlp.data.world.expressions_and_choices import (
    CHINESE_WITH_EXPRESSIONS,
    ENGLISH_WITH_EXPRESSIONS,
    choices,
    expressions,
    neutrals,
)
from fastvlp.data.world.language import CHINESE, ENGLISH, Language, Meaning
from fastvlp.data.world.levels import LEVELS, Combination, Level
from fastvlp.data.world.pair_statements import pair_statements
from fastvlp.data.world.scene import (
    COMBINATIONS,
    HELD_OUT,
    SPLITS,
    Look,
    Scene,
    Thing,
    add_background,
    box,
    draw_looks,
    draw_scene,
    draw_single,
    edit_look,
    place_things,
    render,
)
from fastvlp.errors import UserError


def class_names(pairs: Sequence[Combination]) -> tuple[str, ...]:
    """The names of combinations of a colour and a shape, as classes."""
    return tuple(f"{colour} {shape}" for colour, shape in pairs)


CLASS_NAMES, HELD_OUT_NAMES = class_names(COMBINATIONS), class_names(HELD_OUT)
CLASS_NAMES_ZH = tuple(CHINESE.words[colour][0] + CHINESE.words[shape][0] for colour, shape in COMBINATIONS)

_FORMAT = 1
# Increases when records get new fields. New fields are drawn from their own random generators, so that the values of older
# fields do not change.
_EDITION = 3


@dataclass(frozen=True, kw_only=True)
class WorldConfig:
    """Config of the corpus. A record depends only on this config, its split and its index."""

    seed: int = 0
    """Random seed of the scenes. The same seed gives the same scenes at any `size`."""
    size: int = 64
    """Side of a picture in pixels."""
    captions: int = 5
    """Number of captions of a scene in each language."""
    level: Literal["easy", "standard", "hard"] = "standard"
    """Difficulty: `easy` has a few large things of few shapes on a plain background, and `hard` has many small things on
    patterns. In both, questions can hardly be answered from their text alone."""

    def __post_init__(self) -> None:
        if self.level not in LEVELS:
            raise UserError(f"`level` {self.level!r}: choose one of {', '.join(LEVELS)}")
        if self.size < 16 or self.captions < 1:
            raise UserError(
                f"`size` {self.size}, `captions` {self.captions}: use at least 16 pixels and at least one caption"
            )


@lru_cache
def _languages(level: Level) -> tuple[tuple[Language, Language, str], ...]:
    """Returns for each language: the language with the words of a level, the same with referring expressions, and the ending
    of the names of its fields."""
    english, chinese = (ENGLISH, ENGLISH_WITH_EXPRESSIONS), (CHINESE, CHINESE_WITH_EXPRESSIONS)
    first, second = ([one.shortened(level.words, level.templates) for one in both] for both in (english, chinese))
    return (first[0], first[1], ""), (second[0], second[1], "_zh")


def _rng(config: WorldConfig, *names: str | int) -> Random:
    # The other levels were added later, so the name of the standard level is left out: its draws must not change.
    own = () if config.level == "standard" else (config.level,)
    return Random("/".join(map(str, (_FORMAT, config.seed, *own, *names))))


def _object(thing: Thing, size: int, split: str, level: Level) -> dict[str, Any]:
    """Returns a thing as an object of a record. Its class distribution imitates a detector's: 0.8 for the true class, and 0.05
    for each of four classes that share its colour or its shape."""
    look = thing.look
    name = f"{look.colour} {look.shape}"
    rng = Random(_seed(thing))
    near = [pair for pair in level.allowed(split) if (pair[0] == look.colour) != (pair[1] == look.shape)]
    spread = {f"{colour} {shape}": 0.05 for colour, shape in rng.sample(near, 4)}
    return {
        "class": name,
        "shape": look.shape,
        "colour": look.colour,
        "size": look.size,
        "box": box(thing, size),
        "class_distribution": {name: 0.8, **spread},
    }


def _seed(thing: Thing) -> str:
    """Returns a seed for a thing. The text has the format of the first edition, because another format would change the
    records."""
    size, colour, shape = thing.look
    kind = f"Kind(size={size!r}, colour={colour!r}, shape={shape!r})"
    place = f"x={thing.x!r}, y={thing.y!r}, radius={thing.radius!r}, angle={thing.angle!r}"
    return f"Thing(kind={kind}, {place}, tint={thing.tint!r})"


def _background(scene: Scene) -> dict[str, str]:
    return {"colour": scene.tone, "pattern": scene.pattern}


def _key(kind: str, split: str, index: int) -> str:
    return f"{kind}-{split}-{index:06d}"


def _check(split: str, index: int) -> None:
    if split not in SPLITS or index < 0:
        raise UserError(
            f"`split` {split!r}, `index` {index}: use a split of {', '.join(SPLITS)}, and an index of at least 0"
        )


def _record(
    config: WorldConfig, kind: str, split: str, index: int, scenes: Sequence[Scene], info: dict[str, Any]
) -> Record:
    """Returns a record with pictures of the scenes, and with simulated detector regions of each."""
    rng = _rng(config, "detector", kind, split, index)
    objects = [[o for o in info["objects"] if o.get("image", 0) == side] for side in range(len(scenes))]
    detections = [detect(rng, of_scene, config.size) for of_scene in objects]
    info["confidences"] = [confidences for _, confidences in detections]
    images = tuple(render(scene, config.size) for scene in scenes)
    regions = tuple(npz for npz, _ in detections)
    return Record(key=_key(kind, split, index), images=images, info=info, detected=regions)


def scene_record(config: WorldConfig, split: str, index: int) -> Record:
    """Returns the record of a scene of 2 to 6 objects with captions, questions, statements, expressions, entailments and
    multiple choice, in English and Chinese."""
    _check(split, index)
    level = LEVELS[config.level]
    scene = draw_scene(_rng(config, "scene", split, index), split, level)
    draw_questions = balanced_questions if level.questions else questions
    drawn_questions = draw_questions(_rng(config, "questions", split, index), scene, split)
    drawn_statements = statements(_rng(config, "statements", split, index), scene)
    info: dict[str, Any] = {"objects": [_object(thing, config.size, split, level) for thing in scene.things]}
    for language, _, suffix in _languages(level):
        rng = _rng(config, "words" + suffix, split, index)
        info[f"captions{suffix}"] = captions(rng, language, scene, config.captions)
        info[f"questions{suffix}"] = [
            {"question": language.express(rng, meaning), "answers": {_answer(language, answer): 1.0}, "kind": kind}
            for kind, meaning, answer in drawn_questions
        ]
        info[f"statements{suffix}"] = [
            {"text": language.express(rng, meaning), "label": label} for meaning, label in drawn_statements
        ]
    info["background"] = _background(scene)
    info |= _expressions_and_choices(config, split, index, scene, info)
    return _record(config, "scene", split, index, (scene,), info)


def _expressions_and_choices(
    config: WorldConfig, split: str, index: int, scene: Scene, info: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns the fields that the second edition added: referring expressions, entailments and multiple choice. The entailments
    are the true and the false statements, and about as many neutral statements as there are of each."""
    rng = _rng(config, "expressions", split, index)
    referring, neutral, drawn_choices = expressions(rng, scene), neutrals(rng, scene, split), choices(rng, scene, split)
    orders = [(rng.sample(range(4), 4), rng.sample(range(4), 4)) for _ in drawn_choices]
    fields: dict[str, Any] = {}
    for plain, language, suffix in _languages(scene.level):
        rng = _rng(config, "expression-words" + suffix, split, index)
        fields[f"expressions{suffix}"] = [
            {"text": language.express(rng, meaning), "object": at} for meaning, at in referring
        ]
        fields[f"entailments{suffix}"] = [
            *({"text": one["text"], "label": _ENTAILMENT[one["label"]]} for one in info[f"statements{suffix}"]),
            *({"text": language.express(rng, meaning), "label": "neutral"} for meaning in neutral),
        ]
        fields[f"choices{suffix}"] = [
            {
                "question": language.express(rng, choice.question),
                "answers": [_answer(plain, choice.answers[k]) for k in answers],
                "right": answers.index(0),
                "rationales": [language.express(rng, choice.reasons[k]) for k in reasons],
                "right_rationale": reasons.index(0),
            }
            for choice, (answers, reasons) in zip(drawn_choices, orders)
        ]
    return fields


_ENTAILMENT = {True: "entailment", False: "contradiction"}
_YES_NO_ZH = {"yes": "是", "no": "否"}


def _answer(language: Language, answer: str) -> str:
    """Translates an answer."""
    if language.noun is ENGLISH.noun or answer.isdigit():
        return answer
    return _YES_NO_ZH.get(answer) or language.words[answer][0]


def _pair_looks(rng: Random, split: str, level: Level) -> list[list[list[Look]]]:
    """Draws the looks of two pairs of scenes that differ by a few edits."""
    left = draw_looks(rng, split, level)
    right = list(left) if rng.random() < 0.5 else draw_looks(rng, split, level)
    for _ in range(2):
        right = edit_look(rng, right, level)
    pairs = [[left, right], [edit_look(rng, left, level), edit_look(rng, right, level)]]
    if rng.random() < 0.5:
        pairs[1].reverse()
    rng.shuffle(pairs)
    return pairs


def pair_record(config: WorldConfig, split: str, index: int) -> Record:
    """Returns a record of two scenes with statements about both (as in NLVR2, Suhr et al. 2019, arXiv 1811.00491).

    Records 2k and 2k + 1 have the same statements with opposite labels, so the label cannot be guessed from the text alone.
    The field `image` of an object is 0 for the left scene and 1 for the right scene.
    """
    _check(split, index)
    level = LEVELS[config.level]
    rng = _rng(config, "pair", split, index // 2)
    (english, _, _), _ = _languages(level)
    meanings: list[tuple[Meaning, bool]] = []
    while len(meanings) < 4:
        pairs = _pair_looks(rng, split, level)
        meanings = pair_statements(rng, pairs[0], pairs[1])
    info: dict[str, Any] = {
        "statements": [
            {"text": english.express(rng, meaning), "label": label == (index % 2 == 0)} for meaning, label in meanings
        ]
    }
    rng = _rng(config, "pair-layout", split, index)
    scenes = [add_background(rng, place_things(rng, looks, level), level) for looks in pairs[index % 2]]
    info |= {
        "objects": [
            {**_object(thing, config.size, split, level), "image": side}
            for side, scene in enumerate(scenes)
            for thing in scene.things
        ],
        "backgrounds": [_background(scene) for scene in scenes],
    }
    return _record(config, "pair", split, index, scenes, info)


def single_record(config: WorldConfig, split: str, index: int) -> Record:
    """Returns the record of a scene of one large object with its class as `label`. Consecutive records have different classes.
    The test split has all classes."""
    _check(split, index)
    level = LEVELS[config.level]
    classes = level.allowed(split)
    rng = _rng(config, "single", split, index)
    scene = draw_single(rng, *classes[index % len(classes)], level)
    info: dict[str, Any] = {"objects": [_object(thing, config.size, split, level) for thing in scene.things]}
    info["label"] = info["objects"][0]["class"]
    info["held_out"] = info["label"] in class_names(level.held_out)
    for language, _, suffix in _languages(level):
        info[f"captions{suffix}"] = captions(rng, language, scene, config.captions, single=True)
    info["background"] = _background(scene)
    return _record(config, "single", split, index, (scene,), info)


def _folders(train: int, val: int, test: int, pairs: int, singles: int) -> Iterator[tuple[str, Any, str, int]]:
    for split, count in zip(SPLITS, (train, val, test)):
        yield split, scene_record, split, count
    for split, count in zip(SPLITS, (pairs, pairs // 4, pairs // 4)):
        yield f"pairs-{split}", pair_record, split, count
    for split, count in (("train", singles), ("test", singles)):
        yield f"singles-{split}", single_record, split, count


class WrittenCorpus(NamedTuple):
    """The folder of the corpus, the number of records of each split, and by split and field the score (0 to 1) of answering the
    questions from their text alone, with the most frequent answers of the training split."""

    out: Path
    counts: dict[str, int]
    blind: dict[str, dict[str, float]]


_QUESTIONS = ("questions", "questions_zh")


def _blind_scores(questions_of: Mapping[tuple[str, str], Sequence[AnsweredQuestion]]) -> dict[str, dict[str, float]]:
    """Returns the score of answers from the text alone, by split and field, for all splits except train. `questions_of`: the
    questions by split and field."""
    return {
        split: {
            name: round(own.blind, 4)
            for name in _QUESTIONS
            if (own := blind_score(questions_of["train", name], questions_of[split, name]))
        }
        for split in SPLITS[1:]
    }


def write_world(
    out: Path | None = None,
    config: WorldConfig = WorldConfig(),
    *,
    train: int = 6000,
    val: int = 500,
    test: int = 1000,
    pairs: int = 3000,
    singles: int = 256,
    progress: bool = True,
) -> WrittenCorpus:
    """Write the embedded corpus: rendered scenes with captions, questions and statements.

    The splits are folders of shards: train, val, test; pairs-train, pairs-val, pairs-test; singles-train, singles-test. The
    file `corpus.json` describes them, and says how many questions can be answered from their text alone. If the folder already
    has the same corpus, nothing is written.

    Args:
        out: Folder to write; by default demo/world, or demo/LEVEL for another level.
        config: Seed, picture size, number of captions and level of the corpus.
        train: Number of scenes to train on.
        val: Number of scenes to validate on.
        test: Number of scenes to test on; they have combinations of colour and shape that training never shows.
        pairs: Number of pairs of scenes with statements about both, to train on. The validation and test splits have a quarter
            as many each.
        singles: Number of pictures of one object, for zero-shot classification, to train on; the test split has as many.
        progress: Show a progress bar if stderr is a terminal.

    Raises:
        UserError: The folder contains something else.
    """
    out = Path(out or Path("demo", "world" if config.level == "standard" else config.level))
    level = LEVELS[config.level]
    parts = list(_folders(train, val, test, pairs, singles))
    counts = {name: count for name, _, _, count in parts if count}
    card = {
        "corpus": "fastvlp world",
        "format": _FORMAT,
        "edition": _EDITION,
        # The standard level is not named, as in the cards of older versions.
        "config": {name: value for name, value in asdict(config).items() if (name, value) != ("level", "standard")},
        "counts": counts,
        "classes": list(class_names(level.combinations)),
        "held_out": list(class_names(level.held_out)),
    }
    if not claim(out, card):
        return WrittenCorpus(out, counts, read_card(out / "corpus.json").get("blind", {}))
    questions_of: dict[tuple[str, str], list[AnsweredQuestion]] = {part: [] for part in product(SPLITS, _QUESTIONS)}
    for name, make, split, count in parts:
        if not count:
            continue
        with ShardWriter(out / name) as writer:
            for index in with_progress(range(count), range(count).__len__, name, progress):
                writer.write(record := make(config, split, index))
                for field in _QUESTIONS:
                    questions_of[split, field] += answered_questions(record.info.get(field))
    blind = _blind_scores(questions_of)
    write_card(out / "corpus.json", {**card, "blind": blind, "complete": True})
    return WrittenCorpus(out, counts, blind)
