"""The levels of the embedded corpus: what they show is true too, and the texts of their questions give little away."""

import io
import json
from collections import Counter, defaultdict

import numpy as np
import pytest
from PIL import Image

from fastvlp.cli import main
from fastvlp.data.blind import answered_questions, blind_score
from fastvlp.data.records.shards import Shards
from fastvlp.data.sources.inspection import inspect_data
from fastvlp.data.world import balance, corpus
from fastvlp.data.world.corpus import WorldConfig, pair_record, scene_record, single_record, write_world
from fastvlp.data.world.levels import EASY, HARD, LEVELS
from fastvlp.errors import UserError
from tests.data.world_reader import answer, check_caption, pair_truth, truth

FEW = {"train": 3, "val": 2, "test": 2, "pairs": 0, "singles": 0}


@pytest.fixture(scope="module", params=["easy", "hard"])
def level(request):
    return request.param


@pytest.fixture(scope="module")
def scenes(level):
    """Without pictures, which take most of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "render", lambda scene, size: b"")
        config = WorldConfig(level=level)
        return {split: [scene_record(config, split, i) for i in range(100)] for split in ("train", "test")}


@pytest.mark.slow
def test_what_is_said_is_true(scenes, level):
    for record in scenes["train"][:60] + scenes["test"][:60]:
        things = record.info["objects"]
        assert LEVELS[level].least <= len(things) <= LEVELS[level].most
        assert len(set(record.info["captions"])) == len(set(record.info["captions_zh"])) == 5
        for text in record.info["captions"]:
            check_caption(text, record.info)
        for asked in record.info["questions"]:
            assert asked["answers"] == {answer(asked["question"], things): 1.0}, asked
        for claim in record.info["statements"]:
            assert claim["label"] == truth(claim["text"], things), claim
        for choice in record.info["choices"]:
            assert choice["answers"][choice["right"]] == answer(choice["question"], things)


def test_answers_to_each_kind_of_question_are_equally_frequent(scenes):
    answers = defaultdict(Counter)
    for record in scenes["train"]:
        assert 1 <= len(record.info["questions"]) <= balance.MOST
        for asked in record.info["questions"]:
            answers[asked["kind"]].update(asked["answers"])
    for kind, counts in answers.items():
        most = max(counts.values()) / sum(counts.values())
        assert most < {"count": 0.36, "existence": 0.65, "comparison": 0.65, "size": 0.6}.get(kind, 0.36), (
            kind,
            counts,
        )


def test_the_share_that_is_kept_makes_answers_equally_frequent():
    assert balance._shares(Counter({"yes": 30, "no": 10})) == {"yes": pytest.approx(1 / 3), "no": 1.0}
    # A very rare answer does not make all others rare.
    assert balance._shares(Counter({"1": 100, "2": 50, "9": 1})) == {"1": 0.08, "2": 0.16, "9": 1.0}


def test_text_alone_gives_little(scenes, level):
    train, test = (
        [a for record in scenes[split] for a in answered_questions(record.info["questions"])] for split in scenes
    )
    assert blind_score(train, test).blind < {"easy": 0.37, "hard": 0.3}[level]


def test_held_out_combinations_are_those_of_the_level(scenes, level):
    held_out = set(corpus.class_names(LEVELS[level].held_out))
    assert len(held_out) == len(LEVELS[level].colours)
    assert not any(o["class"] in held_out for record in scenes["train"] for o in record.info["objects"])
    assert all(any(o["class"] in held_out for o in record.info["objects"]) for record in scenes["test"])


def test_pairs_and_singles_have_levels_too(level):
    config = WorldConfig(level=level)
    for i in range(8):
        record = pair_record(config, "train", i)
        assert all(
            claim["label"] == pair_truth(claim["text"], record.info["objects"]) for claim in record.info["statements"]
        )
        single = single_record(config, "test", i)
        assert single.info["label"] == corpus.class_names(LEVELS[level].combinations)[i]


def test_a_scene_has_fewer_captions_where_its_words_do_not_make_as_many():
    record = single_record(WorldConfig(level="easy", size=16, captions=20), "train", 0)
    assert 5 <= len(record.info["captions"]) == len(set(record.info["captions"])) < 20


def test_easy_pictures_are_plain_and_their_things_apart():
    for i in range(5):
        record = scene_record(WorldConfig(level="easy"), "train", i)
        image = np.asarray(Image.open(io.BytesIO(record.images[0])))
        corner = image[0, 0].tolist()
        assert corner in ([248] * 3, [22, 22, 24]) and record.info["background"]["pattern"] == "plain"
        middles = [
            ((x0 + x1) / 2 > 32, (y0 + y1) / 2 > 32) for x0, y0, x1, y1 in (o["box"] for o in record.info["objects"])
        ]
        assert len(set(middles)) == len(middles)
    assert len(EASY.shapes) < len(HARD.shapes) and max(HARD.radii.values()) < max(EASY.radii.values())


def test_each_level_has_a_folder_and_a_card_of_its_own(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert (
        main(["data", "demo", "--level", "easy", *(word for name, n in FEW.items() for word in (f"--{name}", str(n)))])
        == 0
    )
    assert "from their text alone: val " in capsys.readouterr().out
    card = json.loads((tmp_path / "demo/easy/corpus.json").read_text())
    assert card["config"]["level"] == "easy" and len(card["classes"]) == 24 and len(card["held_out"]) == 6
    assert set(card["blind"]) == {"val", "test"} and 0 <= card["blind"]["val"]["questions"] <= 1
    again = write_world(config=WorldConfig(level="easy"), **FEW)
    assert again.blind == card["blind"]
    standard = write_world(**FEW)
    assert str(standard.out) == "demo/world"
    assert "level" not in json.loads((tmp_path / "demo/world/corpus.json").read_text())["config"]
    # A card of an older version, without the blind score.
    path = tmp_path / "demo/world/corpus.json"
    card = json.loads(path.read_text())
    del card["blind"]
    path.write_text(json.dumps(card))
    assert write_world(**FEW) == standard._replace(blind={})
    with pytest.raises(UserError, match="another corpus"):
        write_world(tmp_path / "demo/world", WorldConfig(level="hard"), **FEW)
    with pytest.raises(UserError, match="easy, standard, hard"):
        WorldConfig(level="harder")


def test_inspecting_measures_what_the_text_alone_gives(tmp_path):
    written = write_world(
        tmp_path / "w", WorldConfig(level="easy", size=16), train=12, val=4, test=2, pairs=0, singles=0
    )
    reports = {report.name: report for report in inspect_data(tmp_path / "w", progress=False).splits}
    assert reports["train"].blind == {} and set(reports["val"].blind) == {"questions", "questions_zh"}
    for split in ("val", "test"):
        for field, score in reports[split].blind.items():
            assert score.blind == pytest.approx(written.blind[split][field], abs=1e-4)
            shards = Shards(tmp_path / "w" / split)
            assert score.questions == sum(len(shards.info(i)[field]) for i in range(len(shards)))
