"""Every sentence of the corpus is parsed again (world_reader.py) and checked against the objects' attributes."""

import hashlib
import io
import json
import re
from collections import Counter, defaultdict
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image

from fastvlp.data.records.shards import Shards
from fastvlp.data.world import corpus as world
from fastvlp.data.world.corpus import WorldConfig, pair_record, scene_record, single_record, write_world
from fastvlp.data.world.scene import COLOURS as COLOURS_RGB
from fastvlp.errors import UserError
from tests.data.world_reader import (
    COLOURS,
    CONFIG,
    FRAMES,
    RELATION,
    RELATIONS,
    SHAPES,
    answer,
    check_caption,
    fits,
    matching,
    only,
    pair_truth,
    parse,
    related_thing,
    truth,
    where,
)

SCENES = 300


@pytest.fixture(scope="module")
def scenes():
    return {split: [scene_record(CONFIG, split, i) for i in range(SCENES)] for split in world.SPLITS}


def combinations(record):
    return {(thing["colour"], thing["shape"]) for thing in record.info["objects"]}


def test_captions_are_true_and_of_the_promised_length(scenes):
    seen = Counter()
    for record in scenes["train"] + scenes["test"]:
        assert len(set(record.info["captions"])) == 5
        for text in record.info["captions"]:
            assert 6 <= len(text.split()) <= 20
            seen[check_caption(text, record.info)] += 1
    assert set(FRAMES) - {"single"} <= set(seen)


def test_singles_are_captioned_and_labelled(scenes):
    records = [single_record(CONFIG, "test", i) for i in range(128)]
    assert Counter(record.info["label"] for record in records) == dict.fromkeys(world.CLASS_NAMES, 2)
    for record in records:
        (thing,) = record.info["objects"]
        assert thing["class"] == record.info["label"] == f"{thing['colour']} {thing['shape']}"
        assert record.info["held_out"] == (record.info["label"] in world.HELD_OUT_NAMES)
        for text in record.info["captions"]:
            check_caption(text, record.info)
    for split in ("train", "val"):
        assert not any(single_record(CONFIG, split, i).info["held_out"] for i in range(64))


def test_answers_follow_from_the_objects(scenes):
    for record in scenes["train"] + scenes["test"]:
        for asked in record.info["questions"]:
            assert asked["answers"] == {answer(asked["question"], record.info["objects"]): 1.0}, asked


def test_labels_of_statements_follow_from_the_objects(scenes):
    for record in scenes["train"] + scenes["test"]:
        for claim in record.info["statements"]:
            assert claim["label"] == truth(claim["text"], record.info["objects"]), claim


def meant(text, things):
    """The things that an expression may mean: those that its first phrase fits, on that side of what the second means."""
    skeleton, found = parse(text)
    fitting = matching(found[0], things)
    if skeleton == "#" and len(found) == 1:
        return fitting
    match = re.fullmatch(rf"# (?:that is )?({RELATION}) #", skeleton)
    name = next(name for name, words in RELATIONS.items() if match[1] in words.split("|"))
    anchor = only(found[1], things)
    # Nobody could say of another one that it lies on that side at all.
    return [thing for thing in fitting if thing is not anchor and name in where(thing, anchor, least=0.0)]


def test_an_expression_means_one_thing_alone(scenes):
    counts = Counter()
    for record in scenes["train"] + scenes["test"]:
        things = record.info["objects"]
        for expression in record.info["expressions"]:
            assert meant(expression["text"], things) == [things[expression["object"]]], expression
            counts[len(parse(expression["text"])[1])] += 1
        counts["things"] += len(things)
        assert [e["object"] for e in record.info["expressions_zh"]] == [e["object"] for e in record.info["expressions"]]
    assert counts[1] + counts[2] > 0.85 * counts["things"] and counts[2] > 0.15 * counts["things"]


def test_entailments_are_the_statements_and_neutral_ones(scenes):
    counts = Counter()
    for record in scenes["train"] + scenes["test"]:
        for entry in record.info["entailments"]:
            counts[entry["label"]] += 1
            if entry["label"] == "neutral":
                assert re.search("heavier|drawn before|older|made of paper|on the back of the picture", entry["text"])
                phrases = parse(entry["text"])[1]
                assert all(phrase[0] != "the" or only(phrase, record.info["objects"]) for phrase in phrases)
            else:
                assert truth(entry["text"], record.info["objects"]) == (entry["label"] == "entailment")
    assert set(counts) == {"entailment", "contradiction", "neutral"} and min(counts.values()) > 0.3 * counts.total()


def test_of_four_answers_and_reasons_one_is_right(scenes):
    places, count = Counter(), 0
    for record in scenes["train"] + scenes["test"]:
        things = record.info["objects"]
        for choice, zh in zip(record.info["choices"], record.info["choices_zh"], strict=True):
            assert len(set(choice["answers"])) == len(set(choice["rationales"])) == 4
            assert choice["answers"][choice["right"]] == answer(choice["question"], things), choice
            asked = only(parse(choice["question"].replace("?", ""))[1][0], things)
            right = [reason_holds(text, things) and reason_names(text, asked) for text in choice["rationales"]]
            assert right == [k == choice["right_rationale"] for k in range(4)], choice
            assert all(zh[key] == choice[key] for key in ("right", "right_rationale"))
            places[choice["right"]] += 1
            count += 1
    assert count > SCENES and all(0.2 * count < n < 0.3 * count for n in places.values())


def reason_holds(text, things):
    skeleton, found = parse(text)
    word = re.fullmatch(rf"# is ({RELATION}) #", skeleton)[1]
    return any(related_thing(subject, word, found[1], things) for subject in matching(found[0], things))


def reason_names(text, thing):
    return fits(parse(text)[1][0], thing)


def test_statements_of_pairs_are_true_and_their_text_alone_does_not_give_the_label():
    labels = defaultdict(list)
    for i in range(300):
        record = pair_record(CONFIG, "train", i)
        assert len(record.images) == 2 and len(record.info["statements"]) == 4
        for claim in record.info["statements"]:
            assert claim["label"] == pair_truth(claim["text"], record.info["objects"]), claim
            labels[i // 2, claim["text"]].append(claim["label"])
    assert all(sorted(pair) == [False, True] for pair in labels.values())


def test_the_most_frequent_answer_is_a_weak_guess(scenes):
    highest = {
        "colour": 0.2,
        "shape": 0.2,
        "size": 0.48,
        "count": 0.33,
        "existence": 0.56,
        "relation": 0.33,
        "comparison": 0.58,
    }
    for split in ("train", "test"):
        answers = defaultdict(Counter)
        for record in scenes[split]:
            for asked in record.info["questions"]:
                answers[asked["kind"]].update(asked["answers"])
        assert set(answers) == set(highest)
        for kind, counts in answers.items():
            assert max(counts.values()) / sum(counts.values()) < highest[kind], (split, kind, counts)
        labels = [claim["label"] for record in scenes[split] for claim in record.info["statements"]]
        assert 0.46 < np.mean(labels) < 0.54


def test_words_hardly_give_statements_away(scenes):
    """Naive Bayes on words and their pairs, fitted on train and val, hardly beats chance on the labels of test."""

    def grams(text):
        words = text.split()
        return {*words, *pairwise(words)}

    counts = defaultdict(lambda: [1.0, 1.0])
    for record in scenes["train"] + scenes["val"]:
        for claim in record.info["statements"]:
            for gram in grams(claim["text"]):
                counts[gram][claim["label"]] += 1
    right = []
    for record in scenes["test"]:
        for claim in record.info["statements"]:
            score = sum(np.log(counts[gram][1] / counts[gram][0]) for gram in grams(claim["text"]) if gram in counts)
            right.append((score > 0) == claim["label"])
    assert np.mean(right) < 0.58


def texts(records, suffix=""):
    """All texts of the records; `suffix` "_zh" for Chinese."""
    for record in records:
        yield from record.info.get(f"captions{suffix}", ())
        yield from (asked["question"] for asked in record.info.get(f"questions{suffix}", ()))
        for field in ("statements", "expressions", "entailments"):
            yield from (claim["text"] for claim in record.info.get(f"{field}{suffix}", ()))
        for choice in record.info.get(f"choices{suffix}", ()):
            yield from (choice["question"], *choice["rationales"])


def named(texts):
    """The combinations that English texts name."""
    return {phrase[3:] for text in texts for phrase in parse(text)[1] if None not in phrase[3:]}


def test_held_out_combinations_are_never_seen_or_named_in_training(scenes):
    held_out = {tuple(name.split()) for name in world.HELD_OUT_NAMES}
    assert len(held_out) == 8
    assert {c for c, _ in held_out} == set(COLOURS.values()) and {s for _, s in held_out} == set(SHAPES.values())
    pairs = [pair_record(CONFIG, "train", i) for i in range(100)]
    records = [*scenes["train"], *scenes["val"], *pairs]
    for record in records:
        assert not combinations(record) & held_out
        assert all(not set(t["class_distribution"]) & set(world.HELD_OUT_NAMES) for t in record.info["objects"])
    assert not named(texts(records)) & held_out
    zh = "\n".join(texts(records, "_zh"))
    chinese = dict(zip(world.CLASS_NAMES, world.CLASS_NAMES_ZH))
    assert not any(re.search("(?<!粉)" + chinese[name] + "(?!环)", zh) for name in world.HELD_OUT_NAMES)
    assert set().union(*map(combinations, scenes["train"])) == set(world.COMBINATIONS) - held_out
    assert all(combinations(record) & held_out for record in scenes["test"])


def test_chinese_texts_have_the_same_meaning(scenes):
    for record in scenes["val"]:
        info = record.info
        assert len(set(info["captions_zh"])) == 5
        assert [q["kind"] for q in info["questions"]] == [q["kind"] for q in info["questions_zh"]]
        assert [c["label"] for c in info["statements"]] == [c["label"] for c in info["statements_zh"]]
        assert all(re.fullmatch(r"[\u4e00-\u9fff、,:?]{1,60}", text) for text in texts([record], "_zh"))
        names = {"绿": "green", "蓝": "blue", "黄": "yellow", "紫": "purple", "青": "cyan"}
        for text in info["captions_zh"]:
            shapes = re.findall(r"([绿蓝黄紫青])色?的?(圆环|环形|正方形|方块|菱形|心形|爱心)", text)
            kinds = {"环": "ring", "正": "square", "方": "square", "菱": "diamond", "心": "heart"}
            for colour, noun in shapes:
                shape = next(value for sign, value in kinds.items() if sign in noun)
                assert (names[colour], shape) in combinations(record), text


def test_pictures_show_the_objects_where_the_boxes_are(scenes):
    """The mean colour at the middle of a box (at the rim, for a ring) is nearest to the colour that is named."""
    right = []
    for record in scenes["train"][:100]:
        image = np.asarray(Image.open(io.BytesIO(record.images[0])), dtype=float)
        assert image.shape == (64, 64, 3)
        for thing in record.info["objects"]:
            x0, y0, x1, y1 = thing["box"]
            assert (
                0 <= x0 < x1 <= 64
                and 0 <= y0 < y1 <= 64
                and sum(thing["class_distribution"].values()) == pytest.approx(1)
            )
            x = x0 + 0.13 * (x1 - x0) if thing["shape"] == "ring" else (x0 + x1) / 2
            pixel = image[int((y0 + y1) / 2), int(x)]
            nearest = min(COLOURS_RGB, key=lambda name: np.abs(pixel - COLOURS_RGB[name]).sum())
            right.append(nearest == thing["colour"])
    assert np.mean(right) > 0.97


def test_records_depend_on_seed_split_and_index_only():
    first = scene_record(CONFIG, "train", 7)
    assert first == scene_record(CONFIG, "train", 7)
    others = [
        scene_record(WorldConfig(seed=1), "train", 7),
        scene_record(CONFIG, "val", 7),
        scene_record(CONFIG, "train", 8),
    ]
    assert all(first.info["captions"] != other.info["captions"] for other in others)
    large = scene_record(WorldConfig(size=224), "train", 7)
    assert large.info["captions"] == first.info["captions"]
    assert Image.open(io.BytesIO(large.images[0])).size == (224, 224)
    # Pinned, so that scores of different checkouts are scores on the same corpus; a change is a new _FORMAT.
    parts = [make(CONFIG, "test", 3).info for make in (scene_record, pair_record, single_record)]
    second = ("expressions", "entailments", "choices")
    # The third edition: a detector's confidences.
    parts = [{name: value for name, value in part.items() if name != "confidences"} for part in parts]
    first = [{name: value for name, value in part.items() if not name.startswith(second)} for part in parts]
    assert hashlib.sha256(json.dumps(first).encode()).hexdigest()[:16] == "17ce7d842d331179"
    assert hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16] == "e25deb8fe5d99192"


def test_writing_twice_changes_nothing_and_a_foreign_folder_is_left_alone(tmp_path):
    few = {"train": 3, "val": 2, "test": 2, "pairs": 4, "singles": 2}
    written = write_world(tmp_path / "w", CONFIG, **few)
    counts = written.counts
    assert counts["pairs-test"] == 1 and sum(counts.values()) == 3 + 2 + 2 + 4 + 1 + 1 + 2 + 2
    shards = Shards(str(tmp_path / "w" / "train"))
    assert len(shards) == 3 and shards.read(2) == scene_record(CONFIG, "train", 2)
    tar = tmp_path / "w" / "train" / "00000.tar"
    before = tar.stat().st_mtime_ns
    assert write_world(tmp_path / "w", CONFIG, **few) == written and tar.stat().st_mtime_ns == before
    with pytest.raises(UserError, match="another corpus"):
        write_world(tmp_path / "w", WorldConfig(seed=1), **few)
    card = tmp_path / "w" / "corpus.json"
    card.write_text(card.read_text().replace('"complete": true', '"complete": false'))
    assert write_world(tmp_path / "w", CONFIG, **few) == written and '"complete": true' in card.read_text()
    card.write_text("[1")
    with pytest.raises(UserError, match="not a corpus card"):
        write_world(tmp_path / "w", CONFIG, **few)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="mine"):
        write_world(tmp_path / "mine", CONFIG, **few)


def test_a_bad_config_split_or_index_is_refused():
    with pytest.raises(UserError, match="16 pixels"):
        WorldConfig(size=8)
    with pytest.raises(UserError, match="train, val, test"):
        scene_record(CONFIG, "dev", 0)
