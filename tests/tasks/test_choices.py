"""Visual entailment, and questions with answers and rationales to choose from."""

from dataclasses import replace

import pytest
import torch

from fastvlp.batch import Record
from fastvlp.data.loader import Row
from fastvlp.data.records.schema import LABELS
from fastvlp.data.records.shards import Shards, ShardWriter
from fastvlp.data.regions import RegionSource
from fastvlp.data.tokenize import Tokenizer
from fastvlp.data.world.corpus import WorldConfig, scene_record
from fastvlp.errors import UserError
from fastvlp.model.sizes import tiny_single
from fastvlp.objectives.objective import combine
from fastvlp.tasks import entailment, vcr
from fastvlp.tasks.entailment import EntailmentConfig, EntailmentData
from fastvlp.tasks.vcr import VCRConfig, VCRData, text_types
from fastvlp.training.pretraining import Pretraining
from tests.made import SPECIALS, made_model, made_tokenizer
from tests.made_single import region_batch, single_config, single_model

SIZE = tiny_single(size=32).image.size


def four_types():
    """A single stream with room for the types of answers and rationales."""
    config = single_config()
    torch.manual_seed(0)
    model = type(single_model())(replace(config, single=replace(config.single, types=4)))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.fixture(scope="module")
def tokenizer(world):
    return Tokenizer.train(EntailmentData(train=str(world / "train"), batch_size=4).texts(), vocab_size=300)


@pytest.mark.parametrize("made", [four_types, made_model])
@pytest.mark.parametrize("loss", ["bce", "ce"])
def test_entailment_loss_is_that_of_a_plain_loop(made, loss):
    model, batch = made(), replace(region_batch(lengths=(7, 4, 9), counts=(3, 1, 5)), target=torch.tensor([0, 2, 1]))
    objective = EntailmentConfig(reading="full", loss=loss).build(model.config, made_tokenizer())
    module = Pretraining(model, {"task": objective})
    found = module(batch)["task/label"]
    logits = objective.logits(model, module.encode_image(batch), batch).detach().double()
    total = 0.0
    for row, right in zip(logits, batch.target):
        if loss == "ce":
            total -= row.log_softmax(0)[right].item()
        else:
            total -= sum((x if k == right else -x).sigmoid().log().item() for k, x in enumerate(row))
    assert found.count == 3 and found.total.item() == pytest.approx(total, rel=1e-5)


def test_entailments_are_rows_and_unknown_labels_are_named(world, tokenizer, tmp_path):
    data = EntailmentData(train=str(world / "train"), batch_size=4)
    made = data.items("train", tokenizer, SIZE, strict=True)
    batch, _ = made([Row(k, k) for k in range(6)])
    assert [LABELS[k] for k in batch.target] == [e["label"] for e in Shards(data.train).info(0)["entailments"]][:6]
    with ShardWriter(tmp_path / "train") as writer:
        entries = [{"text": "a star", "label": "neutral"}, {"text": "a star", "label": "maybe"}]
        writer.write(
            Record(key="a", images=scene_record(WorldConfig(size=32), "train", 0).images, info={"entailments": entries})
        )
    made = replace(data, train=str(tmp_path / "train")).items("train", tokenizer, SIZE, strict=False)
    batch, dropped = made([Row(0, 0), Row(1, 1)])
    assert batch.target.tolist() == [2] and "label 'maybe' is not" in dropped[0].reason


class Fixed(torch.nn.Module):
    """Scores items by the order of their rows."""

    def __init__(self, scores):
        super().__init__()
        self.rows = iter(scores)

    def logits(self, model, image_BKD, batch):
        return torch.stack([next(self.rows) for _ in range(len(batch))])


def test_entailment_measures_against_a_loop(world, tokenizer):
    data = EntailmentData(train=str(world / "train"), test=str(world / "test"), batch_size=4, regions=RegionSource())
    made = data.evaluation_items("test", tokenizer, SIZE)
    found = entailment.measure(single_model(crop=4), Fixed(torch.eye(3)[[1] * len(made.items)]), made, 4)
    labels = [item.entry["label"] for item in made.items]
    assert found["accuracy"] == labels.count("entailment") / len(labels)
    assert found["accuracy/entailment"] == 1 and found["accuracy/neutral"] == found["accuracy/contradiction"] == 0
    assert found["accuracy/decided"] == labels.count("entailment") / (len(labels) - labels.count("neutral"))


def test_choices_are_rows_of_question_answer_and_rationale(world, tokenizer):
    data = VCRData(train=str(world / "train"), batch_size=4, max_length=60)
    made, shards = data.items("train", tokenizer, SIZE, strict=True), Shards(data.train)
    first = next(i for i in range(len(shards)) if shards.info(i)["choices"])
    entry = shards.info(first)["choices"][0]
    batch, _ = made([Row(k, k) for k in range(8)])
    assert batch.target.tolist() == [int(k == entry["right"]) for k in range(4)] + [
        int(k == entry["right_rationale"]) for k in range(4)
    ]
    right = entry["answers"][entry["right"]]
    for k in range(8):
        parts = (
            [entry["question"], entry["answers"][k]]
            if k < 4
            else [entry["question"], right, entry["rationales"][k - 4]]
        )
        ids = [tokenizer.encode([part], 60)[0][0].tolist() for part in parts]
        assert batch.ids[k, : batch.length[k]].tolist() == ids[0] + [i for part in ids[1:] for i in part[1:]]


def test_each_part_of_the_text_has_its_type():
    """A </s> has the type of the part that it ends; the released code is not consistent here."""
    eos, pad = SPECIALS["eos"], SPECIALS["pad"]
    ids = torch.tensor([[1, 7, eos, 8, eos, 9, eos], [1, 7, 7, eos, 8, eos, pad]])
    kinds = text_types(ids, eos)
    assert kinds[0].tolist() == [0, 0, 0, 2, 2, 3, 3] and kinds[1, :6].tolist() == [0, 0, 0, 0, 2, 2]
    model, batch = four_types(), region_batch(lengths=(7, 7), counts=(3, 1))
    batch = replace(batch, ids=ids[:1].expand(2, -1), target=torch.tensor([1, 0]))
    plain, own = (VCRConfig(reading="full", kinds=k).build(model.config, made_tokenizer()) for k in (False, True))
    own.load_state_dict(plain.state_dict())
    own.begin(model)
    inputs = (model, batch.regions.feature, batch)
    torch.testing.assert_close(own.logits(*inputs), plain.logits(*inputs))  # they start as the question's
    torch.nn.init.normal_(model.single.kinds[3])
    assert not torch.allclose(own.logits(*inputs), plain.logits(*inputs), atol=1e-3)
    combine(Pretraining(model, {"task": own})(batch)).backward()
    assert model.single.kinds.grad.abs().sum(1).gt(0).all()
    with pytest.raises(UserError, match=r"single\.types to 4"):
        VCRConfig(reading="full").build(single_config(), made_tokenizer())


def test_what_is_chosen_is_the_best_of_its_question(world, tokenizer):
    data = VCRData(train=str(world / "train"), test=str(world / "test"), batch_size=4, regions=RegionSource())
    made = data.evaluation_items("test", tokenizer, SIZE)
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(len(made.items), 2, generator=generator)
    found = vcr.measure(single_model(crop=4), Fixed(scores), made, 4)
    right = {"answer": [], "rationale": []}
    for first in range(0, len(made.items), 4):  # four answers, four rationales, ...
        best = scores[first : first + 4, 1].argmax().item()
        right[made.items[first].entry["part"]].append(made.items[first + best].entry["label"])
    both = [a and b for a, b in zip(right["answer"], right["rationale"], strict=True)]
    count = len(both)
    assert found["count"] == count > 1 and found["both"] == sum(both) / count
    assert found["accuracy"] == found["answer"] == sum(right["answer"]) / count
    assert found["rationale"] == sum(right["rationale"]) / count


def test_questions_that_cannot_be_used_are_named(tmp_path, tokenizer):
    image = scene_record(WorldConfig(size=32), "train", 0).images[0]
    good = {"question": "what is it?", "answers": ["a star", "a ring"], "right": 1}
    bad = [
        good | {"right": 2},
        good | {"answers": ["a star"]},
        good | {"rationales": ["because", 3], "right_rationale": 0},
    ]
    with ShardWriter(tmp_path / "train") as writer:
        for key, entry in [("good", good), *((f"bad{k}", entry) for k, entry in enumerate(bad))]:
            writer.write(Record(key=key, images=(image,), info={"choices": [entry]}))
    made = VCRData(train=str(tmp_path / "train"), batch_size=4).items("train", tokenizer, SIZE, strict=False)
    batch, dropped = made([Row(k, k) for k in range(len(made.items))])
    assert [d.key for d in dropped] == ["bad0", "bad1", "bad2"] and batch.target.tolist() == [0, 1, 0, 1]
    assert "the right one of its 2 answers is 2" in dropped[0].reason


@pytest.mark.parametrize("score", [0.5, float("nan")])
def test_a_model_that_scores_all_choices_alike_has_chance(world, tokenizer, score):
    """The right choice may be stored first in all questions (Visual7W)."""
    data = VCRData(train=str(world / "train"), test=str(world / "test"), batch_size=4, regions=RegionSource())
    items = data.evaluation_items("test", tokenizer, SIZE)
    found = vcr.measure(single_model(crop=4), Fixed(torch.full((len(items.items), 2), score)), items, 4)
    choices = [item for item in items.items if item.entry["part"] == "answer"]
    assert found["answer"] == pytest.approx(found["count"] / len(choices))
