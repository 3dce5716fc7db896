"""The embedded corpus: rendered scenes with captions, objects, questions and statements, for runs without a download.

Every record is a function of (seed, split, index) alone. The test split shows combinations of colour and shape that
neither train nor val ever shows or names (`HELD_OUT`), so that a score on it means generalisation.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from fastvlp.batch import Record
from fastvlp.data.records.shards import ShardWriter
from fastvlp.data.streams import with_progress
from fastvlp.data.world.detector import detect
from fastvlp.data.world.expressions import CHINESE_TOO, ENGLISH_TOO, choices, expressions, neutrals
from fastvlp.data.world.image_pairs import pair_sayings
from fastvlp.data.world.language import CHINESE, ENGLISH, Language, Saying
from fastvlp.data.world.scene import (
    COMBINATIONS,
    HELD_OUT,
    SEEN,
    SPLITS,
    Kind,
    Scene,
    Thing,
    allowed,
    arrange,
    box,
    draw_kinds,
    draw_scene,
    draw_single,
    edit_kinds,
    on_background,
    render,
)
from fastvlp.data.world.sentences import captions, questions, statements
from fastvlp.errors import UserError
from fastvlp.files import write_whole

CLASS_NAMES = tuple(f"{colour} {shape}" for colour, shape in COMBINATIONS)
HELD_OUT_NAMES = tuple(f"{colour} {shape}" for colour, shape in HELD_OUT)
CLASS_NAMES_ZH = tuple(CHINESE.words[colour][0] + CHINESE.words[shape][0] for colour, shape in COMBINATIONS)

_FORMAT = 1
# Counts what records tell; fields of a later edition are drawn apart, so that those of the earlier ones stay as they were.
_EDITION = 3


@dataclass(frozen=True, kw_only=True)
class WorldConfig:
    """Which corpus: every record is a function of this config, its split and its number."""

    seed: int = 0
    """Seed of the scenes; those of a seed are the same at any size."""
    size: int = 64
    """Side of a picture in pixels."""
    captions: int = 5
    """Captions of a scene in each language."""

    def __post_init__(self) -> None:
        if self.size < 16 or self.captions < 1:
            raise UserError(
                f"`size` {self.size}, `captions` {self.captions}: use at least 16 pixels and at least one caption"
            )


def _rng(config: WorldConfig, *names: str | int) -> Random:
    return Random("/".join(map(str, (_FORMAT, config.seed, *names))))


def _object(thing: Thing, size: int, split: str) -> dict[str, Any]:
    """The class distribution imitates a detector's: four fifths on the truth, the rest on what looks most like it."""
    kind = thing.kind
    name = f"{kind.colour} {kind.shape}"
    rng = Random(repr(thing))
    near = [pair for pair in allowed(split) if (pair[0] == kind.colour) != (pair[1] == kind.shape)]
    spread = {f"{colour} {shape}": 0.05 for colour, shape in rng.sample(near, 4)}
    return {
        "class": name,
        "shape": kind.shape,
        "colour": kind.colour,
        "size": kind.size,
        "box": box(thing, size),
        "class_distribution": {name: 0.8, **spread},
    }


def _background(scene: Scene) -> dict[str, str]:
    return {"colour": scene.tone, "pattern": scene.pattern}


def _key(kind: str, split: str, index: int) -> str:
    return f"{kind}-{split}-{index:06d}"


def _check(split: str, index: int) -> None:
    if split not in SPLITS or index < 0:
        raise UserError(f"world: split {split!r}, index {index}: use one of {', '.join(SPLITS)} and an index from 0")


def _record(
    config: WorldConfig, kind: str, split: str, index: int, scenes: Sequence[Scene], info: dict[str, Any]
) -> Record:
    """With the pictures, and a detector's regions of each."""
    rng = _rng(config, "detector", kind, split, index)
    shown = [[o for o in info["objects"] if o.get("image", 0) == side] for side in range(len(scenes))]
    found = [detect(rng, objects, config.size) for objects in shown]
    info["confidences"] = [confidences for _, confidences in found]
    images = tuple(render(scene, config.size) for scene in scenes)
    return Record(
        key=_key(kind, split, index), images=images, info=info, detected=tuple(regions for regions, _ in found)
    )


def scene_record(config: WorldConfig, split: str, index: int) -> Record:
    """One scene of 2 to 6 objects with captions, questions, statements, expressions, entailments and multiple choice, in
    English and Chinese."""
    _check(split, index)
    scene = draw_scene(_rng(config, "scene", split, index), split)
    asked = questions(_rng(config, "questions", split, index), scene, split)
    claims = statements(_rng(config, "statements", split, index), scene, split)
    info: dict[str, Any] = {"objects": [_object(thing, config.size, split) for thing in scene.things]}
    for language, suffix in ((ENGLISH, ""), (CHINESE, "_zh")):
        rng = _rng(config, "words" + suffix, split, index)
        info[f"captions{suffix}"] = captions(rng, language, scene, config.captions)
        info[f"questions{suffix}"] = [
            {"question": language.say(rng, saying), "answers": {_answer(language, answer): 1.0}, "kind": kind}
            for kind, saying, answer in asked
        ]
        info[f"statements{suffix}"] = [{"text": language.say(rng, saying), "label": label} for saying, label in claims]
    info["background"] = _background(scene)
    info |= _second_edition(config, split, index, scene, info)
    return _record(config, "scene", split, index, (scene,), info)


def _second_edition(
    config: WorldConfig, split: str, index: int, scene: Scene, info: Mapping[str, Any]
) -> dict[str, Any]:
    """Expressions, entailments (the statements, and about as many neutral ones as of either label), multiple choice."""
    rng = _rng(config, "expressions", split, index)
    meant, open_ones, chosen = expressions(rng, scene), neutrals(rng, scene, split), choices(rng, scene, split)
    orders = [(rng.sample(range(4), 4), rng.sample(range(4), 4)) for _ in chosen]
    found: dict[str, Any] = {}
    for plain, language, suffix in ((ENGLISH, ENGLISH_TOO, ""), (CHINESE, CHINESE_TOO, "_zh")):
        rng = _rng(config, "expression-words" + suffix, split, index)
        found[f"expressions{suffix}"] = [{"text": language.say(rng, saying), "object": at} for saying, at in meant]
        found[f"entailments{suffix}"] = [
            *({"text": told["text"], "label": _JUDGED[told["label"]]} for told in info[f"statements{suffix}"]),
            *({"text": language.say(rng, saying), "label": "neutral"} for saying in open_ones),
        ]
        found[f"choices{suffix}"] = [
            {
                "question": language.say(rng, choice.question),
                "answers": [_answer(plain, choice.answers[k]) for k in answers],
                "right": answers.index(0),
                "rationales": [language.say(rng, choice.reasons[k]) for k in reasons],
                "right_rationale": reasons.index(0),
            }
            for choice, (answers, reasons) in zip(chosen, orders)
        ]
    return found


_JUDGED = {True: "entailment", False: "contradiction"}
_PLAIN_ZH = {"yes": "是", "no": "否"}


def _answer(language: Language, answer: str) -> str:
    if language is ENGLISH or answer.isdigit():
        return answer
    return _PLAIN_ZH.get(answer) or language.words[answer][0]


def _pair_kinds(rng: Random, split: str) -> list[list[list[Kind]]]:
    """Two pairs that differ by a few edits: what is true of one and false of the other is said of both."""
    left = draw_kinds(rng, split)
    right = list(left) if rng.random() < 0.5 else draw_kinds(rng, split)
    for _ in range(2):
        right = edit_kinds(rng, right, split)
    pairs = [[left, right], [edit_kinds(rng, left, split), edit_kinds(rng, right, split)]]
    if rng.random() < 0.5:
        pairs[1].reverse()
    rng.shuffle(pairs)
    return pairs


def pair_record(config: WorldConfig, split: str, index: int) -> Record:
    """Two scenes with statements about both (NLVR2, Suhr et al. 2019).

    Records 2k and 2k + 1 carry the same statements with opposite labels: the text alone tells nothing.
    Objects carry `image`, 0 for the left one and 1 for the right one.
    """
    _check(split, index)
    rng = _rng(config, "pair", split, index // 2)
    sayings: list[tuple[Saying, bool]] = []
    while len(sayings) < 4:
        pairs = _pair_kinds(rng, split)
        sayings = pair_sayings(rng, pairs[0], pairs[1])
    info: dict[str, Any] = {
        "statements": [
            {"text": ENGLISH.say(rng, saying), "label": label == (index % 2 == 0)} for saying, label in sayings
        ]
    }
    rng = _rng(config, "pair-layout", split, index)
    scenes = [on_background(rng, arrange(rng, kinds)) for kinds in pairs[index % 2]]
    info |= {
        "objects": [
            {**_object(thing, config.size, split), "image": side}
            for side, scene in enumerate(scenes)
            for thing in scene.things
        ],
        "backgrounds": [_background(scene) for scene in scenes],
    }
    return _record(config, "pair", split, index, scenes, info)


def single_record(config: WorldConfig, split: str, index: int) -> Record:
    """One large object with its class as `label`; classes take turns. The test split shows all of them."""
    _check(split, index)
    classes = COMBINATIONS if split == "test" else SEEN
    rng = _rng(config, "single", split, index)
    scene = draw_single(rng, *classes[index % len(classes)])
    info: dict[str, Any] = {"objects": [_object(thing, config.size, split) for thing in scene.things]}
    info["label"] = info["objects"][0]["class"]
    info["held_out"] = info["label"] in HELD_OUT_NAMES
    for language, suffix in ((ENGLISH, ""), (CHINESE, "_zh")):
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


def _claim(folder: Path, card: Mapping[str, Any]) -> bool:
    """Whether `folder` is to be written; what an interrupted run left there is removed."""
    path = folder / "corpus.json"
    if path.exists():
        try:
            found = dict(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise UserError(f"{path}: not a corpus card ({error}); delete the folder or choose another") from error
        if found == {**card, "complete": True}:
            return False
        if found.get("complete", True):
            raise UserError(
                f"{path}: another corpus ({found.get('config')}, edition {found.get('edition', 1)}) lies here; delete the "
                f"folder or choose another"
            )
        for part in card["counts"]:
            for file in [*(folder / part).glob("*.tar*"), *(folder / part).glob("*.index.json")]:
                file.unlink()
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: not an empty folder, and it holds no corpus.json; choose an empty or a new one")
    folder.mkdir(parents=True, exist_ok=True)
    _write_card(path, {**card, "complete": False})
    return True


def _write_card(path: Path, card: Mapping[str, Any]) -> None:
    write_whole(path, (json.dumps(card, indent=2, ensure_ascii=False) + "\n").encode())


class WrittenCorpus(NamedTuple):
    """The folder of the corpus, and the number of records of each split."""

    out: Path
    counts: dict[str, int]


def write_world(
    out: Path = Path("demo/world"),
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

    The splits are folders of shards: train, val, test; pairs-train, pairs-val, pairs-test; singles-train, singles-test.
    `corpus.json` beside them describes them. The same corpus already there is left as it is. Raises UserError where the
    folder holds something else.

    Args:
        out: Folder to write.
        config: Which corpus.
        train: Scenes to train on.
        val: Scenes to validate on.
        test: Scenes with combinations of colour and shape that training never shows.
        pairs: Pairs of scenes with statements about both, to train on; a quarter as many each to validate and test on.
        singles: Pictures of one object, for zero-shot classification, in training and as many in the test.
        progress: Show a bar, where stderr is a terminal.
    """
    out = Path(out)
    parts = list(_folders(train, val, test, pairs, singles))
    counts = {name: count for name, _, _, count in parts if count}
    card = {
        "corpus": "fastvlp world",
        "format": _FORMAT,
        "edition": _EDITION,
        "config": asdict(config),
        "counts": counts,
        "classes": list(CLASS_NAMES),
        "held_out": list(HELD_OUT_NAMES),
    }
    if not _claim(out, card):
        return WrittenCorpus(out, counts)
    for name, make, split, count in parts:
        if not count:
            continue
        with ShardWriter(out / name) as writer:
            for index in with_progress(range(count), range(count).__len__, name, progress):
                writer.write(make(config, split, index))
    _write_card(out / "corpus.json", {**card, "complete": True})
    return WrittenCorpus(out, counts)
