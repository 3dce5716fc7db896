import pytest
import torch

from fastvlp.batch import Record
from fastvlp.data.loader import Row
from fastvlp.data.records.shards import Shards, ShardWriter
from fastvlp.data.regions import RegionSource
from fastvlp.data.tokenize import Tokenizer
from fastvlp.data.world.corpus import WorldConfig, scene_record
from fastvlp.errors import UserError
from fastvlp.model.sizes import tiny
from fastvlp.tasks.nlvr import NLVRData
from fastvlp.tasks.nlvr2 import NLVR2Data
from fastvlp.tasks.vqa import VQAData, choose, frequent_answers

SIZE = tiny(size=32, patch=16).image.size


@pytest.fixture(scope="module")
def tokenizer(world):
    data = VQAData(train=str(world / "train"), batch_size=4, answers=("yes",))
    return Tokenizer.train(data.texts(), vocab_size=300)


def test_frequent_answers_are_the_best_scored_first(world):
    answers = frequent_answers(str(world / "train"))
    assert {"yes", "no"} <= set(answers)
    assert frequent_answers(str(world / "train"), most=3) == answers[:3]
    assert "是" in frequent_answers(str(world / "train"), "questions_zh")


def test_vqa_rows_are_questions_with_soft_targets(world, tokenizer):
    answers = frequent_answers(str(world / "train"))[:5]
    data = VQAData(train=str(world / "train"), test=str(world / "test"), batch_size=4, answers=answers)
    made = data.items("test", tokenizer, SIZE, strict=True)
    shards = Shards(world / "test")
    asked = [(i, question) for i in range(len(shards)) for question in shards.info(i)["questions"]]
    assert [(item.record, item.entry) for item in made.items] == asked
    batch, dropped = made([Row(i, 7 + i) for i in range(6)])
    assert not dropped and len(batch) == 6 and batch.slot is None
    for row, (_, question) in zip(batch.target, asked):
        assert row.tolist() == [question["answers"].get(answer, 0.0) for answer in answers]
    assert batch.image[0].equal(batch.image[1])  # two questions about one scene
    assert tokenizer.decode(batch.ids[0]).replace(" ", "") == asked[0][1]["question"].replace(" ", "")


def test_training_leaves_out_questions_without_a_possible_answer(world, tokenizer):
    data = VQAData(train=str(world / "train"), test=str(world / "test"), batch_size=4, answers=("red", "blue"))
    train = data.items("train", tokenizer, SIZE, strict=False)
    assert 0 < len(train.items) < len(data.read(Shards(data.train)))
    assert all(not {"red", "blue"}.isdisjoint(item.entry["answers"]) for item in train.items)
    assert data.rows("test", tokenizer, SIZE, strict=True).count == len(data.read(Shards(data.test)))
    assert data.rows("val", tokenizer, SIZE, strict=True) is None
    with pytest.raises(UserError, match="'val'"):
        data.evaluation_items("val", tokenizer, SIZE)


def test_rows_name_damaged_shards(world, tokenizer, tmp_path):
    tar = tmp_path / "00000.tar"
    tar.write_bytes((whole := (world / "train" / "00000.tar").read_bytes())[: len(whole) // 2])
    data = VQAData(train=str(tmp_path), batch_size=4, answers=("yes",))
    assert data.rows("train", tokenizer, SIZE, strict=False).damage[0].key == str(tar)


def test_nlvr2_rows_are_pairs(world, tokenizer):
    data = NLVR2Data(train=str(world / "pairs-train"), batch_size=4)
    made = data.items("train", tokenizer, SIZE, strict=True)
    for _ in range(2):  # decoded, then from the cache
        batch, _ = made([Row(0, 11), Row(5, 12)])
        assert len(batch) == 4 and batch.slot.tolist() == [0, 1, 0, 1]
        assert batch.ids[0].equal(batch.ids[1]) and not batch.image[0].equal(batch.image[1])
        assert batch.target.tolist() == [int(made.items[k].entry["label"]) for k in (0, 5)]
        assert len(set(batch.seed.tolist())) == 4


def test_items_say_how_long_their_rows_are(world, tokenizer):
    """Words and regions, of all rows of an item together."""
    regions = RegionSource(most=3)
    questions = VQAData(train=str(world / "train"), batch_size=4, answers=("yes", "no"), regions=regions, max_length=12)
    pairs = NLVR2Data(train=str(world / "pairs-train"), batch_size=4)
    for data, images in ((questions, 1), (pairs, 2)):
        rows = data.rows("train", tokenizer, SIZE, strict=True)
        batch, _ = rows.make([Row(i, i) for i in range(rows.count)])
        length_B = batch.length + (0 if batch.regions is None else batch.regions.count)
        table = rows.lengths()
        assert table(torch.arange(rows.count), torch.arange(rows.count)).equal(length_B.view(-1, images).sum(1))


def test_records_with_another_number_of_images_are_dropped(world, tokenizer):
    data = NLVRData(train=str(world / "pairs-train"), batch_size=4)
    batch, dropped = data.items("train", tokenizer, SIZE, strict=False)([Row(0, 1)])
    assert len(batch) == 0 and "has 2 images, 1 needed" in dropped[0].reason


def test_a_missing_field_is_named(world):
    with pytest.raises(UserError, match=r"'questions_fr'.*fields: .*captions"):
        frequent_answers(str(world / "train"), "questions_fr")


def test_training_drops_what_evaluation_refuses(tmp_path, tokenizer):
    good = scene_record(WorldConfig(size=32), "train", 0)
    entries = [{"text": "there is a shape", "label": True}, {"text": "no label"}, {"text": " ", "label": True}, "x"]
    with ShardWriter(tmp_path / "train") as writer:
        writer.write(Record(key="good", images=good.images, info={"statements": entries}))
        writer.write(Record(key="broken", images=(good.images[0][:60],), info={"statements": entries[:1]}))
    data = NLVRData(train=str(tmp_path / "train"), batch_size=4)
    train = data.items("train", tokenizer, SIZE, strict=False)
    assert len(train.items) == 5
    batch, dropped = train([Row(i, i) for i in range(5)])
    assert len(batch) == 1 and batch.target.tolist() == [1]
    assert [d.key for d in dropped] == ["good", "good", "good", "broken"]
    strict = data.items("train", tokenizer, SIZE, strict=True)
    with pytest.raises(UserError, match="leaves none out"):
        strict([Row(4, 0)])


def test_scores_that_are_no_numbers_are_named(tmp_path, tokenizer):
    image = scene_record(WorldConfig(size=32), "train", 0).images[0]
    right = {"question": "is it red", "answers": {"yes": 1.0}}
    bad = [{"question": "is it", "answers": a} for a in ({"yes": "often"}, {"no": float("nan")}, {"no": -1}, ["yes"])]
    with ShardWriter(tmp_path / "train") as writer:
        writer.write(Record(key="good", images=(image,), info={"questions": [right]}))
        writer.write(Record(key="bad", images=(image,), info={"questions": bad}))
        writer.write(Record(key="text", images=(image,), info={"questions": "is it red"}))
        writer.write(Record(key="untrue", images=(image,), info={"statements": [{"text": "x", "label": "False"}]}))
    folder = str(tmp_path / "train")
    assert frequent_answers(folder) == ("yes",)
    data = VQAData(train=folder, test=folder, batch_size=4, answers=("yes", "no"))
    train = data.items("train", tokenizer, SIZE, strict=False)
    batch, dropped = train([Row(i, i) for i in range(6)])
    assert batch.target.tolist() == [[1, 0]] and [d.key for d in dropped] == ["bad"] * 4 + ["text"]
    assert dropped[0].reason == "field questions: score 'often' of answer 'yes' is not a number from 0 to 1"
    assert dropped[4].reason == "field questions is not a list"
    with pytest.raises(UserError, match=r"bad: field questions: score nan of answer 'no'.*leaves none out"):
        data.evaluation_items("test", tokenizer, SIZE)([Row(0, 0), Row(2, 0)])
    with pytest.raises(UserError, match="untrue: field statements: label 'False' is not true or false"):
        NLVRData(train=folder, batch_size=4).items("train", tokenizer, SIZE, strict=False)


def test_a_choice_is_one_of_the_answers():
    place = {"a": 0, "b": 1, "c": 2}
    scores = torch.tensor([0.1, 3.0, 2.0])
    assert choose(scores, ["zebra", "a", "c"], place) == "c"
    assert choose(scores, ["zebra", "lion"], place) is None
